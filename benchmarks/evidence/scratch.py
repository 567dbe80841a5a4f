"""Trains one model of the study from nothing, keeps where it stands, measures it by document, and writes its row."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from arms import BASE_WIDTH, BATCH_SIZE, Run, build
from numpy.typing import NDArray
from text import WINDOW, Text, Windows, read_text
from torch import nn
from torch.nn.functional import cross_entropy
from variants import Streams

EVERY_SECONDS = 240.0  # between two checkpoints
CURVE_POINTS = 50
ROUNDED = 5  # digits of a document's loss


def train(run: Run, work: Path, results: Path) -> dict[str, Any]:
    """Trains a model, or goes on where it stood; its row is written to `results` when it is finished.

    Killed and started again, it comes to the same result: a checkpoint holds weights, optimizer and step, and what a
    step reads and draws depends on the seed and the step alone.
    """
    text = read_text()
    model = build(run)
    optimizer = _optimizer(model, run)
    folder = work / run.name
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    step, seconds, sums = 0, 0.0, [0.0] * CURVE_POINTS
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, sums = state["step"], state["seconds"], state["sums"]
    started = saved = time.perf_counter()
    steps = run.tokens // (WINDOW * BATCH_SIZE)
    blocks = text.train[: len(text.train) // WINDOW * WINDOW].reshape(-1, WINDOW)
    order = np.random.default_rng(run.seed).permutation(len(blocks))
    model.train()
    while step < steps:
        rows = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        loss = _step(model, optimizer, _tensor(blocks[rows]), run, step, steps)
        sums[step * CURVE_POINTS // steps] += loss
        step += 1
        if time.perf_counter() - saved > EVERY_SECONDS and step < steps:
            saved = time.perf_counter()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "sums": sums}
            _replace(checkpoint, state | {"seconds": seconds + saved - started})
    row = _row(run, model, text, steps, sums) | {"seconds": round(seconds + time.perf_counter() - started, 1)}
    _replace(folder / "final.pt", model.state_dict())
    results.mkdir(parents=True, exist_ok=True)
    partial = results / f".{run.name}.partial"
    partial.write_text(json.dumps(row) + "\n")
    partial.replace(results / f"{run.name}.json")
    checkpoint.unlink(missing_ok=True)
    return row


def measure(model: nn.Module, windows: Windows) -> dict[str, NDArray[np.float64]]:
    """Mean loss of each document, in nats per byte, at its beginning and in its middle."""
    model.eval()
    losses = np.concatenate([_window_losses(model, ids) for ids in _batches(windows.ids, BATCH_SIZE)])
    middle = losses[:, WINDOW // 2 - 1 :].mean(1)  # of the second half: bytes 128 to 255
    of_window = np.where(windows.is_middle, middle, losses.mean(1))
    result = {}
    for where, chosen in (("beginning", ~windows.is_middle), ("middle", windows.is_middle)):
        owners = windows.document[chosen]
        result[where] = np.bincount(owners, of_window[chosen]) / np.bincount(owners)
    return result


def _window_losses(model: nn.Module, ids: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Of each byte but the first, (W, 255)."""
    batch = _tensor(ids)
    with torch.no_grad(), _autocast():
        logits = model(batch)[:, :-1].float()
    losses = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return losses.double().view(len(ids), -1).numpy()


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor, run: Run, step: int, steps: int
) -> float:
    warmup = max(1, steps // 20)
    scale = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale
    if isinstance(model, Streams):
        model.at_step(run.seed, step)
    with _autocast():
        logits = model(batch)
    loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
    total = loss + model.penalty if isinstance(model, Streams) else loss
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not math.isfinite(value := float(loss.detach())):
        raise ValueError(f"{run.name} did not train: its loss is {value} in step {step}")
    return value


def _optimizer(model: nn.Module, run: Run) -> torch.optim.Optimizer:
    rate = run.learning_rate * BASE_WIDTH / run.hidden
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        of_streams = "prefix" in name or "aggregate_layer" in name or "of_stream" in name
        groups.setdefault((parameter.ndim > 1, of_streams), []).append(parameter)
    factor = model.rate_of_streams if isinstance(model, Streams) else 1.0
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": 0.1 * is_matrix, "peak": rate * (factor if of_streams else 1.0)}
            for (is_matrix, of_streams), parameters in groups.items()
        ],
        lr=rate,
        betas=(0.9, 0.95),
    )


def _row(run: Run, model: nn.Module, text: Text, steps: int, sums: list[float]) -> dict[str, Any]:
    tuning, test = measure(model, text.tuning), measure(model, text.test)
    inner = model.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    row = {
        "run": asdict(run),
        "params": parameters - inner.get_input_embeddings().weight.numel(),
        "tuning": {where: [round(float(loss), ROUNDED) for loss in losses] for where, losses in tuning.items()},
        "test": {where: [round(float(loss), ROUNDED) for loss in losses] for where, losses in test.items()},
        "curve": [round(total * CURVE_POINTS / steps, 4) for total in sums],
        "text": text.digest,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    if isinstance(model, Streams):
        ids = _tensor(text.tuning.ids[-32:])
        with torch.no_grad(), _autocast():
            report = inner.stream_report(ids, labels=ids)
        apart = ~torch.eye(run.streams, dtype=torch.bool)
        row["streams"] = {
            "losses": [round(float(loss), ROUNDED) for loss in report.losses],
            "weights": [round(float(weight), 4) for weight in report.weights.float().mean((0, 1))],
            "correlation": round(float(report.correlation[apart].mean()), 4),
        }
    return row


def _autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def _tensor(ids: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(ids.astype(np.int64))


def _batches(ids: NDArray[np.uint8], size: int) -> Iterator[NDArray[np.uint8]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))


def _replace(path: Path, state: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    torch.save(state, partial)
    os.replace(partial, path)
