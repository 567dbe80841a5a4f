"""Trains wrapped models with the Trainer, in one process or in each of those that torchrun starts.

    torchrun --nproc-per-node 2 train.py FOLDER RUN...

FOLDER holds the backbones by their names; each run's checkpoints, models and figures go to FOLDER/RUN.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import accelerate.state
import torch
import torch.distributed as dist
import yaml
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import parscale

CONFIGURATIONS = Path(__file__).parents[3] / "examples" / "accelerate"
STEPS, ROWS, LENGTH = 4, 8, 9


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        backbone: its name.
        kind: `"plain"` (DDP where there are several processes), `"fsdp2"` or `"zero3"`.
        frozen: the backbone does not train.
        further: there is an inactive set of streams beside the one that trains.
        checkpoints: under fsdp2, the type of the Trainer's checkpoints.
        resume: the run whose second step's checkpoint it goes on from.
        init: of the streams.
        transform: of the streams.
        kv: of the streams.
        options: of the Trainer.
        early: the Trainer's arguments, and with them zero3, are there before the model.
    """

    backbone: str
    kind: str = "plain"
    frozen: bool = False
    further: bool = False
    checkpoints: str = "SHARDED_STATE_DICT"
    resume: str | None = None
    init: str = "random"
    transform: str = "prefix"
    kv: str = "own"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    early: bool = False


ALL = Run("llama")
FROZEN = Run("qwen2", frozen=True, further=True)
RUNS = {
    "one-all": ALL,
    "one-frozen": FROZEN,
    "ddp-all": ALL,
    "ddp-frozen": FROZEN,
    "ddp-from-one": dataclasses.replace(ALL, resume="one-all"),
    "one-from-ddp": dataclasses.replace(ALL, resume="ddp-all"),
    "fsdp2-all": dataclasses.replace(
        ALL, kind="fsdp2", checkpoints="FULL_STATE_DICT", options={"gradient_checkpointing": True}
    ),
    "fsdp2-frozen": dataclasses.replace(FROZEN, kind="fsdp2"),
    "fsdp2-from-two": dataclasses.replace(FROZEN, kind="fsdp2", resume="fsdp2-frozen"),
    "one-context": dataclasses.replace(FROZEN, init="context"),
    **{
        f"{kind}-{name}": dataclasses.replace(FROZEN, kind="fsdp2" if kind == "fsdp2" else "plain", **changes)
        for kind in ("one", "ddp", "fsdp2")
        for name, changes in {
            "prompt": {"transform": "prompt"},
            "lora": {"transform": "lora"},
            "shared": {"kv": "shared"},
        }.items()
    },
    "one-shared-all": dataclasses.replace(ALL, kv="shared"),
    "ddp-shared-all": dataclasses.replace(ALL, kv="shared"),
    "fsdp2-shared-all": dataclasses.replace(
        ALL, kind="fsdp2", kv="shared", options={"gradient_checkpointing": True}, checkpoints="FULL_STATE_DICT"
    ),
    "zero3-all": dataclasses.replace(ALL, kind="zero3"),
    "zero3-context": dataclasses.replace(FROZEN, kind="zero3", init="context", early=True),
}


def arguments(run: Run, folder: Path) -> TrainingArguments:
    options: dict[str, Any] = dict(run.options)
    if run.kind == "fsdp2":
        settings = yaml.safe_load((CONFIGURATIONS / "fsdp2.yaml").read_text())["fsdp_config"]
        options |= {"fsdp": True, "fsdp_config": settings | {"fsdp_state_dict_type": run.checkpoints}}
    if run.kind == "zero3":
        options["deepspeed"] = str(CONFIGURATIONS / "zero3.json")
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // processes(),
        learning_rate=1e-2,
        adam_epsilon=1e-3,  # else a gradient that is nothing but rounding makes a step of full size
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=2,
        use_cpu=run.kind != "zero3",
        disable_tqdm=True,
        report_to=[],
        **options,
    )


def wrapped(run: Run, root: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(root / run.backbone, dtype=torch.float32)
    parscale.wrap(model, 4, prefix_length=3, init=run.init, seed=3, transform=run.transform, rank=2, kv=run.kv)
    if run.further:
        model.add_streams("code", 2, prefix_length=2, init="random", seed=5)
    if run.frozen:
        model.freeze_backbone()
    return model


def train(root: Path, name: str) -> dict[str, Any]:
    """Trains and saves; returns the figures of the run."""
    run, folder = RUNS[name], root / name
    ids = torch.randint(3, 90, (STEPS * ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    settings = arguments(run, folder) if run.early else None
    model = wrapped(run, root)
    trainer = Trainer(model, settings or arguments(run, folder), train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(root / run.resume / "checkpoint-2") if run.resume else None)
    entries = trainer.state.log_history
    figures: dict[str, Any] = {
        "losses": [entry["loss"] for entry in entries if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in entries if "grad_norm" in entry],
        "processes": processes(),
    }
    trainer.save_model(str(folder / "trainer"))
    model.save_pretrained(folder / "whole")
    model.save_streams(folder / "streams")
    if run.kind != "zero3":  # of which only the engine runs a model
        figures["report"] = model.eval().stream_report(ids[:2]).weights.flatten().tolist()
        figures["generated"] = model.generate(ids[:2], max_new_tokens=3, do_sample=False).tolist()
    figures["sharded"] = any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters())
    if run.kind != "plain":
        try:
            model.add_streams("late", 2, init="random")
        except ValueError as error:
            figures["refused"] = str(error)
    return figures


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def fsdp_on_cpus() -> None:
    """Makes accelerate use FSDP on CPUs too; by itself it goes on with DDP there, and says nothing."""
    own = accelerate.state.AcceleratorState.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, kwargs["fsdp_plugin"]
            accelerate.state.PartialState._shared_state["distributed_type"] = self.distributed_type

    accelerate.state.AcceleratorState.__init__ = init


def zero3_on_cpus() -> None:
    """Makes accelerate count the processes under DeepSpeed on CPUs too; DeepSpeed compiles nothing."""
    import deepspeed.comm.torch  # noqa: F401

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    accelerate.state.PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)


def load_on_cpus() -> None:
    """Makes torch.load know "cpu:0", where transformers 5.16 asks for the optimizer's state."""

    def keep(storage: Any, location: str) -> Any:
        return storage if location.startswith("cpu:") else None

    torch.serialization.register_package(0, lambda storage: None, keep)


def main() -> None:
    load_on_cpus()
    root, names = Path(sys.argv[1]), sys.argv[2:]
    (zero3_on_cpus if RUNS[names[0]].kind == "zero3" else fsdp_on_cpus)()
    for name in names:
        figures = train(root, name)
        dist.barrier()
        if dist.get_rank() == 0:
            (root / name / "figures.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
