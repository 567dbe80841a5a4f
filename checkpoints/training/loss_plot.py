"""The plot of a training run's metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def plot_metrics(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Saves a figure: the training loss and its running mean, and the losses on the evaluation texts.

    Args:
        metrics: the lines of `metrics.jsonl`.
        path: the file; its suffix sets the format.
    """
    steps = [line for line in metrics if "loss" in line]
    measured: dict[str, list[tuple[float, float]]] = {}
    backbone: dict[str, float] = {}
    for line in metrics:
        if "eval_loss" in line:
            measured.setdefault(line["text"], []).append((line["tokens"], line["eval_loss"]))
        elif "backbone_loss" in line:
            backbone[line["text"]] = line["backbone_loss"]
    panels = 1 + len(measured)
    figure = Figure(figsize=(5.5 * panels, 4), layout="constrained")
    first, *others = figure.subplots(1, panels, squeeze=False)[0]
    tokens = np.array([line["tokens"] for line in steps])
    losses = np.array([line["loss"] for line in steps])
    first.plot(tokens, losses, color="tab:blue", alpha=0.3, linewidth=0.8)
    width = max(1, len(losses) // 30)
    if len(losses) >= width:
        mean = np.convolve(losses, np.ones(width) / width, mode="valid")
        first.plot(tokens[width - 1 :], mean, color="tab:blue", label=f"mean of {width} steps")
        first.legend()
    first.set(title="Training loss", xlabel="tokens", ylabel="nats per token")
    for axes, (name, points) in zip(others, measured.items(), strict=True):
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label="with streams" if backbone else "model")
        if name in backbone:
            axes.axhline(backbone[name], color="black", linewidth=0.8, linestyle="--", label="untouched backbone")
        axes.set(title=f"Loss on {name}", xlabel="tokens")
        axes.legend()
    figure.savefig(path, dpi=150)
