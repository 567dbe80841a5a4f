"""Trains one language model of the study from nothing, measures it by document, and writes its row."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from arms import BASE_WIDTH, Run, build
from loop import DEVICE, autocast, finish, fit, non_embedding_parameters
from numpy.typing import NDArray
from text import WINDOW, Text, Windows, read_text
from torch import nn
from torch.nn.functional import cross_entropy
from variants import Streams

MEASURED_AT_ONCE = 8 if DEVICE.type == "cpu" else 256  # windows; more leave a CPU's caches and are slower
COMPILED_FROM = 3_000_000  # tokens: all of a size alike
ROUNDED = 5  # digits of a document's loss


def train(run: Run, work: Path, results: Path) -> dict[str, Any]:
    """Trains a model, or goes on where it stood; its row is written to `results` when it is finished."""
    text, model, folder = read_text(), build(run), work / run.name
    blocks = text.train[: len(text.train) // WINDOW * WINDOW].reshape(-1, WINDOW)
    rng = np.random.default_rng(run.seed)
    passes = 1 + run.tokens // text.train.size
    order = np.concatenate([rng.permutation(len(blocks)) for _ in range(passes)])

    def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = _tensor(blocks[order[step * run.batch_size : (step + 1) * run.batch_size]])
        return ids, ids

    rate = run.learning_rate * BASE_WIDTH / run.hidden
    steps = run.tokens // (WINDOW * run.batch_size)
    compiled = run.tokens > COMPILED_FROM
    trained = fit(model, batch_of, steps, rate=rate, seed=run.seed, folder=folder, compiled=compiled)
    row = _row(run, model, text) | trained._asdict()
    finish(row, model, folder, results / f"{run.name}.json")
    return row


def measure(model: nn.Module, windows: Windows) -> dict[str, list[float]]:
    """Mean loss of each document, in nats per byte, at its beginning and in its middle."""
    model.to(DEVICE).eval()
    starts = range(0, len(windows.ids), MEASURED_AT_ONCE)
    losses = np.concatenate([window_losses(model, windows.ids[start : start + MEASURED_AT_ONCE]) for start in starts])
    middle = losses[:, WINDOW // 2 - 1 :].mean(1)  # of the second half: bytes 128 to 255
    of_window = np.where(windows.is_middle, middle, losses.mean(1))
    result = {}
    for where, chosen in (("beginning", ~windows.is_middle), ("middle", windows.is_middle)):
        owners = windows.document[chosen]
        means = np.bincount(owners, of_window[chosen]) / np.bincount(owners)
        result[where] = [round(float(mean), ROUNDED) for mean in means]
    return result


def window_losses(model: nn.Module, ids: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The loss of each byte but the first, in nats, (W, 255)."""
    batch = _tensor(ids)
    with torch.no_grad(), autocast():
        logits = model(batch)[:, :-1].float()
    losses = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return losses.double().view(len(ids), -1).cpu().numpy()


def _row(run: Run, model: nn.Module, text: Text) -> dict[str, Any]:
    row = {
        "run": asdict(run),
        "params": non_embedding_parameters(model),
        "tuning": measure(model, text.tuning),
        "test": measure(model, text.test),
        "text": text.digest,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
    }
    if isinstance(model, Streams):
        ids = _tensor(text.tuning.ids[-32:])
        with torch.no_grad(), autocast():
            report = model.model.stream_report(ids, labels=ids)
        apart = ~torch.eye(run.streams, dtype=torch.bool)
        row["streams"] = {
            "mixed": round(float(window_losses(model, text.tuning.ids[-32:]).mean()), ROUNDED),
            "losses": [round(float(loss), ROUNDED) for loss in report.losses],
            "weights": [round(float(weight), 4) for weight in report.weights.float().mean((0, 1))],
            "correlation": round(float(report.correlation[apart].mean()), 4),
        }
    return row


def _tensor(ids: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(ids.astype(np.int64)).to(DEVICE)
