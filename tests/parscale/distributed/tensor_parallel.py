"""Wraps, trains, saves and loads models that are split over the processes that torchrun starts, or over none.

    torchrun --nproc-per-node 2 tensor_parallel.py FOLDER

FOLDER holds the backbones by their names; what comes out goes to FOLDER/tensor-parallel-2.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import parscale
from parscale.distributed.parallel import of_all_processes

IDS = torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(0))
# Heads that are split, also with norms of each head; heads that are gathered.
BACKBONES = {"llama": "sdpa", "qwen3": "sdpa", "olmo2": "sdpa"}


def backbone(root: Path, name: str) -> Any:
    split = {"distributed_config": DistributedConfig(tp_size=processes())} if processes() > 1 else {}
    return AutoModelForCausalLM.from_pretrained(
        root / name, dtype=torch.float32, attn_implementation=BACKBONES[name], **split
    )


def trained(model: Any, *, frozen: bool, clip: bool = False) -> list[float]:
    """The losses of four steps, and the one after them."""
    model.train()
    if frozen:
        model.freeze_backbone()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A fused optimizer, and the norm of all gradients, take parameters of one kind only. With a small eps, a gradient
    # that is nothing but rounding makes a step of full size.
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3, fused=frozen)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, loss_of(model)]


@torch.no_grad()
def loss_of(model: Any) -> float:
    return model.eval()(IDS, labels=IDS).loss.item()


def run(root: Path, out: Path) -> dict[str, Any]:
    """What to compare between one process and two, by the name of what was done."""
    figures: dict[str, Any] = {}
    for name in BACKBONES:
        model = parscale.wrap(backbone(root, name), 4, prefix_length=3, init="random", seed=3)
        prefix = next(value for name, value in model.named_parameters() if name.endswith("prefix_k"))
        figures[f"{name} heads here"] = parscale.distributed.parallel.local(prefix).shape[1]
        figures[f"{name} all"] = trained(model, frozen=False)
        model.save_pretrained(out / name)

    model = parscale.wrap(backbone(root, "llama"), 3, prefix_length=3, init="random", seed=3, kv="shared")
    figures["shared keys all"] = trained(model, frozen=False)
    model.save_pretrained(out / "shared")

    model = parscale.wrap(backbone(root, "llama"), 4, prefix_length=3, init="context", seed=3)
    model.add_streams("code", 2, prefix_length=2, init="random", seed=5)
    model.gradient_checkpointing_enable()
    figures["frozen"] = trained(model, frozen=True, clip=True)
    figures["generated"] = model.generate(IDS[:2], max_new_tokens=5, do_sample=False).tolist()
    figures["sampled"] = model.generate(IDS[:2], max_new_tokens=3, num_beams=2, do_sample=False).tolist()
    model.save_pretrained(out / "full")
    model.save_streams(out / "streams")
    (out / "taken").touch()
    failure = ""
    try:
        model.save_streams(out / "taken")
    except (OSError, RuntimeError) as error:
        failure = f"{type(error).__name__}: {error}"
    figures["failures"] = of_all_processes(failure) if processes() > 1 else [failure]
    with model.use_streams("code"):
        figures["further set"] = loss_of(model)
    figures["all of them DTensors"] = all(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)

    model.add_streams("sharing", 3, prefix_length=2, init="random", seed=6, kv="shared")
    with model.use_streams("sharing"):
        figures["shared keys"] = loss_of(model)
        figures["generated with shared keys"] = model.generate(IDS[:2], max_new_tokens=5, do_sample=False).tolist()

    try:
        model.add_streams("low-rank", 2, transform="lora")
        model.set_streams("default")
    except ValueError as error:
        figures["refused"] = str(error)
    split = {"tp_plan": "auto"} if processes() > 1 else {}
    saved_by_one = root / "tensor-parallel-1"
    model = parscale.load(saved_by_one / "full", **split)
    figures["full folder"] = loss_of(model)
    figures["its further set"] = sorted(model.parscale.sets)
    streams = parscale.load(saved_by_one / "streams", backbone=root / "llama", **split)
    figures["streams folder"] = loss_of(streams)
    auto = AutoModelForCausalLM.from_pretrained(
        saved_by_one / "full", **{"distributed_config": DistributedConfig(tp_size=processes())} if split else {}
    )
    figures["by AutoModelForCausalLM"] = loss_of(auto)

    model = backbone(root, "llama")
    torch.manual_seed(int(os.environ.get("RANK", "0")))  # the processes would draw differently
    figures["seeded by the first process"] = loss_of(parscale.wrap(model, 3, prefix_length=4))
    return figures


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def main() -> None:
    out = Path(sys.argv[1], f"tensor-parallel-{processes()}")
    figures = run(Path(sys.argv[1]), out)
    if dist.get_rank() == 0:
        (out / "figures.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
