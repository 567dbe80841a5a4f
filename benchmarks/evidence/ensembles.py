"""What P trained models say on average: P times the parameters and P times the compute, a control at equal compute."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import Run, build
from loop import claimed, non_embedding_parameters, write_row
from scratch import ROUNDED, measure, window_losses
from scratch import train as train_member
from text import read_text
from torch import nn
from torch.nn.functional import log_softmax


@dataclass(frozen=True)
class EnsembleRun:
    """Several seeds of one run, which need be finished."""

    run: Run
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of its row."""
        return f"average-{'-'.join(map(str, self.seeds))}-of-{self.run.name}"

    @property
    def members(self) -> list[Run]:
        """The run at each seed."""
        return [Run(**asdict(self.run) | {"seed": seed}) for seed in self.seeds]


class Average(nn.Module):
    """Models as one function of token ids, whose predicted probabilities are their mean."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`(B, S)` to logarithms of the mean probabilities `(B, S, V)`."""
        each = torch.stack([log_softmax(model(ids).float(), dim=-1) for model in self.models])
        return each.logsumexp(0) - torch.log(torch.tensor(float(len(self.models))))


def train(run: EnsembleRun, work: Path, results: Path) -> dict[str, Any]:
    """The final weights are read, and the average is measured; members whose weights are gone are trained again."""
    models = []
    for member in run.members:
        weights = work / member.name / "final.pt"
        while not weights.exists():
            with claimed(work / f"{member.name}.lock") as is_mine:
                if is_mine:
                    train_member(member, work, work / member.name)  # its published row stays
                else:
                    time.sleep(10)
        model = build(member)
        model.load_state_dict(torch.load(weights, map_location="cpu"))
        models.append(model)
    text = read_text()
    alone = np.stack([window_losses(model.eval(), text.tuning.ids[-32:]).ravel() for model in models])  # (M, tokens)
    apart = ~np.eye(len(models), dtype=bool)
    row = {
        "run": asdict(run.run) | {"arm": "average", "seed": run.seeds[0], "streams": len(run.seeds)},
        "params": sum(map(non_embedding_parameters, models)),
        "tuning": measure(Average(models), text.tuning),
        "test": measure(Average(models), text.test),
        "text": text.digest,
        "streams": {  # what a model's streams are described by, for models that share nothing
            "losses": [round(float(loss), ROUNDED) for loss in alone.mean(1)],
            "weights": [round(1 / len(models), 4)] * len(models),
            "correlation": round(float(np.corrcoef(alone)[apart].mean()), 4),
        },
        "seconds": 0.0,
    }
    write_row(row, results / f"{run.name}.json")
    return row
