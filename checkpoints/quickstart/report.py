"""The quickstart's report for people: tables, a few sentences, what the models wrote, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

Report = Mapping[str, Any]


def print_report(report: Report, console: Console) -> None:
    """Print what was measured, in figures and in words, and what each model wrote."""
    for text in next(iter(report["models"].values()))["loss"]:
        console.print(loss_table(report, text))
    for sentence in sentences(report):
        console.print(f"* {sentence}", highlight=False)
    for figures in report["models"].values():
        console.rule(f"written by: {figures['title']}")
        console.print(figures["written"], highlight=False, markup=False)
    console.rule()
    console.print(
        f"Took {report['seconds']:.0f} seconds. The models, report.json and report.png are in {report['output']}.",
        highlight=False,
        markup=False,
    )


def loss_table(report: Report, text: str) -> Table:
    """Each model's loss on one kind of text, and its difference from the first model with its interval."""
    baseline = next(iter(report["models"]))
    differences = {
        comparison["model"]: comparison
        for comparison in report["comparisons"]
        if comparison["baseline"] == baseline and comparison["text"] == text
    }
    documents = next(iter(differences.values()))["documents"]
    table = Table(title=f"{text}, {documents} documents: mean loss in nats per token")
    for column in ("", "trains", "loss", "difference (95 % interval)"):
        table.add_column(column, justify="right" if column else "left")
    for name, figures in report["models"].items():
        difference = differences.get(name)
        table.add_row(
            figures["title"],
            f"{figures['trained_parameters']:,}",
            f"{figures['loss'][text]:.4f}",
            "{difference:+.4f} ({low:+.4f}, {high:+.4f})".format(**difference) if difference else "",
        )
    return table


def sentences(report: Report) -> list[str]:
    """The comparisons in words, which say that there is no gain where an interval does not show one."""
    result = []
    for (model, baseline), comparisons in groupby(report["comparisons"], lambda c: (c["model"], c["baseline"])):
        titles = [report["models"][name]["title"] for name in (model, baseline)]
        findings = "; ".join(f"{comparison['text']}: {_finding(comparison)}" for comparison in comparisons)
        result.append(f"{titles[0]}, against {titles[1]}: {findings}.")
    return result


def plot(report: Report, training_losses: Mapping[str, Sequence[float]], path: Path) -> None:
    """Save a figure: training losses, the same less those of the last row, and the paired differences with intervals.

    All rows see the same batches in the same order, so between rows the difference from step to step is a fair one.
    """
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(3, 3, 4))
    last = list(training_losses)[-1]
    for name, losses in training_losses.items():
        steps = min(len(losses), len(training_losses[last]))
        width = max(1, steps // 8)
        tokens = report["models"][name]["trained_tokens"] / len(losses) * np.arange(width, steps + 1) / 1000
        kernel = np.ones(width) / width
        title = report["models"][name]["title"]
        left.plot(tokens, np.convolve(losses[:steps], kernel, mode="valid"), label=title)
        differences = np.subtract(losses[:steps], training_losses[last][:steps])
        middle.plot(tokens, np.convolve(differences, kernel, mode="valid"), label=title)
    left.set(title="Training loss, running mean", xlabel="thousand tokens", ylabel="nats per token")
    middle.set(title=f"The same, less {report['models'][last]['title']}", xlabel="thousand tokens")
    left.legend()

    labels = []
    for position, comparison in enumerate(reversed(report["comparisons"])):
        mean, low, high = (comparison[key] for key in ("difference", "low", "high"))
        color = "tab:green" if high < 0 else "tab:red" if low > 0 else "tab:gray"
        right.errorbar(mean, position, xerr=[[mean - low], [high - mean]], fmt="o", capsize=3, color=color)
        titles = [report["models"][comparison[key]]["title"] for key in ("model", "baseline")]
        labels.append(f"{comparison['text']}: {titles[0]}\nagainst {titles[1]}")
    right.locator_params(axis="x", nbins=5)
    right.axvline(0, color="black", linewidth=0.8)
    right.set_yticks(range(len(labels)), labels, fontsize=7)
    right.set(title="Difference in loss by document, 95 % interval", xlabel="nats per token; left of 0 is better")
    figure.savefig(path, dpi=150)


def _finding(comparison: Mapping[str, Any]) -> str:
    count = f"better on {comparison['improved']} of {comparison['documents']} documents"
    if comparison["high"] < 0:
        return f"a gain of {-comparison['difference']:.4f}, {count}"
    if comparison["low"] > 0:
        return f"no gain: worse by {comparison['difference']:.4f}, {count}"
    return f"no gain: {comparison['difference']:+.4f} is within chance, {count}"
