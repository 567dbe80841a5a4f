"""The loop that trains every model of the study from scratch; killed and started again, it comes to the same result."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from variants import Streams

EVERY_SECONDS = 240.0  # between two checkpoints
CURVE_POINTS = 50
IGNORED = -100  # as a label: nothing is predicted there
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CAPABILITIES = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 does not tell any
# Without instructions for bfloat16 a processor takes eight times as long in it as in float32.
PRECISION = "bfloat16" if DEVICE.type == "cuda" or CAPABILITIES.get("avx512_bf16") else "float32"

Batch = tuple[torch.Tensor, torch.Tensor]
"""Token ids and labels, each (B, S)."""


class Trained(NamedTuple):
    """How a training went."""

    seconds: float
    curve: list[float]
    """Mean training loss in each fiftieth of the steps."""


def fit(
    model: nn.Module,
    batch_of: Callable[[int], Batch],
    steps: int,
    *,
    rate: float,
    seed: int,
    folder: Path,
    compiled: bool = False,
) -> Trained:
    """Trains a model in place, or goes on from the checkpoint in `folder`.

    AdamW, a warm-up over 5 % of the steps and a cosine to zero. A checkpoint holds weights, optimizer and step, and
    what a step reads and draws depends on the seed and the step alone.

    Args:
        model: what `arms.build` gives.
        batch_of: the batch of a step.
        steps: how many.
        rate: the learning rate at its peak.
        seed: of what variants draw.
        folder: where the checkpoint lies; it stays there until `finish`.
        compiled: whether steps run through `torch.compile`, which takes half a minute to begin with and a third less
            for each step.
    """
    optimizer = _optimizer(model.to(DEVICE), rate)
    checkpoint = folder / "checkpoint.pt"
    step, seconds, sums = 0, 0.0, [0.0] * CURVE_POINTS
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=DEVICE)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, sums = state["step"], state["seconds"], state["sums"]
    started = saved = time.perf_counter()
    model.train()
    forward = torch.compile(model) if compiled else model
    while step < steps:
        sums[step * CURVE_POINTS // steps] += _step(model, forward, optimizer, batch_of(step), seed, step, steps)
        step += 1
        if time.perf_counter() - saved > EVERY_SECONDS or step == steps:
            saved = time.perf_counter()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "sums": sums}
            _save(state | {"seconds": seconds + saved - started}, checkpoint)
    counts = [0] * CURVE_POINTS
    for index in range(steps):
        counts[index * CURVE_POINTS // steps] += 1
    curve = [round(total / count, 4) for total, count in zip(sums, counts, strict=True) if count]
    return Trained(round(seconds + time.perf_counter() - started, 1), curve)


def finish(row: dict[str, Any], model: nn.Module, folder: Path, path: Path) -> None:
    """Keeps the final weights in the run's folder, writes its row, and removes the checkpoint."""
    _save(model.state_dict(), folder / "final.pt")
    write_row(row, path)
    (folder / "checkpoint.pt").unlink(missing_ok=True)


def write_row(row: dict[str, Any], path: Path) -> None:
    """Writes a row with the precision of its products, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(row | {"precision": PRECISION}) + "\n")
    partial.replace(path)


@contextmanager
def claimed(lock: Path) -> Iterator[bool]:
    """Whether this process alone holds the lock; the system releases it when the process ends, however it ends."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def non_embedding_parameters(model: nn.Module) -> int:
    """N: all parameters but those of the embedding, which is the output matrix too."""
    inner: Any = model.model
    return sum(parameter.numel() for parameter in model.parameters()) - inner.get_input_embeddings().weight.numel()


def is_of_streams(name: str) -> bool:
    """Whether a parameter, by its name, belongs to streams or one prefix, and not to the backbone."""
    return "prefix" in name or "aggregate_layer" in name or "of_stream" in name


def autocast() -> torch.autocast:
    """bfloat16 where torch finds it safe and the machine has it, in training and measuring alike."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=PRECISION == "bfloat16")


def _step(
    model: nn.Module,
    forward: Callable[[torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    seed: int,
    step: int,
    steps: int,
) -> float:
    warmup = max(1, steps // 20)
    scale = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale
    if isinstance(model, Streams):
        model.at_step(seed, step)
    ids, labels = (part.to(DEVICE) for part in batch)
    with autocast():
        logits = forward(ids)
    loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)
    total = loss + model.penalty if isinstance(model, Streams) else loss
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not math.isfinite(value := float(loss.detach())):
        raise ValueError(f"the training failed: its loss is {value} in step {step}; give it a lower learning rate")
    return value


def _optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault((parameter.ndim > 1, is_of_streams(name)), []).append(parameter)
    factor = model.rate_of_streams if isinstance(model, Streams) else 1.0
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": 0.1 * is_matrix, "peak": rate * (factor if of_streams else 1.0)}
            for (is_matrix, of_streams), parameters in groups.items()
        ],
        lr=rate,
        betas=(0.9, 0.95),
    )


def _save(state: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    torch.save(state, partial)
    os.replace(partial, path)
