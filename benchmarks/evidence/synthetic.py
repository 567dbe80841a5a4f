"""Trains one small model on one task from nothing, and measures how often its answers are right."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import BASE_WIDTH, build
from loop import DEVICE, IGNORED, Batch, autocast, finish, fit, non_embedding_parameters
from tasks import VOCABULARY, Examples, examples
from torch import nn
from torch.nn.functional import cross_entropy

BATCH_SIZE = 64
TEST_EXAMPLES = 4096


@dataclass(frozen=True)
class TaskRun:
    """One model on one task."""

    task: str
    level: int
    """How hard: the N of `tasks.py`."""
    hidden: int
    layers: int
    streams: int
    steps: int
    seed: int
    learning_rate: float
    """At a width of 48."""
    arm: str = "streams"
    prefix_length: int = 8
    variant: str = ""

    @property
    def name(self) -> str:
        """Of its row and its folder; it tells every field."""
        parts = [self.task, str(self.level), self.arm, f"h{self.hidden}", f"l{self.layers}", f"p{self.streams}"]
        parts += [f"t{self.prefix_length}", f"n{self.steps}", f"r{self.learning_rate:g}", f"s{self.seed}"]
        return "-".join(parts + ([self.variant.replace("=", "")] if self.variant else []))


def train(run: TaskRun, work: Path, results: Path) -> dict[str, Any]:
    """Trains a model, or goes on where it stood; its row is written to `results` when it is finished."""
    model, folder = build(run, VOCABULARY), work / run.name

    def batch_of(step: int) -> Batch:
        rng = np.random.default_rng((run.seed, step))
        return _batch(examples(run.task, run.level, rng, BATCH_SIZE))

    rate = run.learning_rate * BASE_WIDTH / run.hidden
    trained = fit(model, batch_of, run.steps, rate=rate, seed=run.seed, folder=folder)
    row = {"run": asdict(run), "params": non_embedding_parameters(model)} | trained._asdict()
    for side, draw in (("tuning", 1 << 40), ("test", 1 << 41)):
        held_out = examples(run.task, run.level, np.random.default_rng(draw), TEST_EXAMPLES, held_out=True)
        row[side] = measure(model, held_out)
    finish(row, model, folder, results / f"{run.name}.json")
    return row


def measure(model: nn.Module, test: Examples) -> dict[str, float]:
    """How many answers are right as a whole, how many of their tokens, and the loss of a token.

    Tokens are scored after the right ones before them; an answer is right as a whole exactly when writing the likeliest
    token each time gives it.
    """
    model.to(DEVICE).eval()
    right, losses = [], []
    for start in range(0, len(test.ids), BATCH_SIZE):
        ids, labels = _batch(Examples(test.ids[start : start + BATCH_SIZE], test.answer))
        with torch.no_grad(), autocast():
            logits = model(ids)[:, -1 - test.answer : -1].float()  # (B, A, V), each before a token of the answer
        answer = labels[:, -test.answer :]
        right.append(logits.argmax(-1) == answer)
        losses.append(cross_entropy(logits.flatten(0, 1), answer.flatten(), reduction="none"))
    hits = torch.cat(right)  # (n, A)
    return {
        "exact": round(float(hits.all(1).double().mean()), 5),
        "tokens": round(float(hits.double().mean()), 5),
        "loss": round(float(torch.cat(losses).double().mean()), 5),
    }


def _batch(batch: Examples) -> Batch:
    ids = torch.from_numpy(batch.ids).to(DEVICE)
    labels = ids.clone()
    labels[:, : -batch.answer] = IGNORED
    return ids, labels
