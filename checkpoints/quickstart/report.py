"""The quickstart's report for people: tables, sentences, generated text, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from parscale.checkpoints.evaluation.controls import HELD_AGAINST
from parscale.checkpoints.evaluation.paired_differences import format_interval, in_the_middle, no_middle, verdict
from parscale.checkpoints.evaluation.places import BEGINNING, MIDDLE

Report = Mapping[str, Any]
QUICKSTART_CONTROLS = {  # the quickstart trains no adapter
    arm: tuple(baseline for baseline in HELD_AGAINST[arm] if baseline != "lora")
    for arm in ("frozen", "streams-and-backbone")
}
"""The baselines of the quickstart's two models with streams, by the names that `report.json` has for all of them."""

EXPLANATION = (
    "Trained: how many parameters. Difference: from the untouched backbone, paired by document; negative is better.",
    "One prefix is trained as two streams that stay equal, which is why it counts more parameters than it needs.",
    "Do streams gain? They do if, in the middles of documents, their loss is below that of the untouched backbone, of "
    "the backbone trained alone and of one trained prefix, of T and of P*T tokens. At beginnings alone is not enough.",
)


def print_report(report: Report, console: Console) -> None:
    """Prints the measurements, as figures and in words, and the text that each model generated."""
    for text, places in next(iter(report["models"].values()))["loss"].items():
        for where in places:
            console.print(loss_table(report, text, where))
    for line in EXPLANATION:
        console.print(line, highlight=False)
    for sentence in quickstart_sentences(report):
        console.print(f"* {sentence}", highlight=False)
    for figures in report["models"].values():
        if figures["written"] is not None:
            console.rule(f"written by: {figures['title']}")
            console.print(figures["written"], highlight=False, markup=False)
    console.rule()
    console.print(
        f"Took {report['seconds']:.0f} seconds. The models, report.json and report.png are in {report['output']}.",
        highlight=False,
        markup=False,
    )


def loss_table(report: Report, text: str, where: str) -> Table:
    """Each model's loss at one place of one kind of text, and the interval of its difference from the first model."""
    baseline = next(iter(report["models"]))
    differences = {
        entry["arm"]: entry
        for entry in report["comparisons"]
        if (entry["baseline"], entry["text"], entry["where"]) == (baseline, text, where)
    }
    documents = next(iter(differences.values()))["documents"]
    places = {BEGINNING: "Beginnings", MIDDLE: "Middles"}
    title = f"{places[where]} of {documents} documents of {text}: mean loss in nats per token, lower is better"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("trained", "loss", "difference (95 % interval)"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, figures in report["models"].items():
        table.add_row(
            figures["title"],
            f"{figures['trained_parameters']:,}",
            f"{figures['loss'][text][where]:.4f}",
            format_interval(differences[name]) if name in differences else "",
        )
    return table


def quickstart_sentences(report: Report) -> list[str]:
    """The comparisons of streams with their controls, in words, and whether streams gain.

    Streams gain on a text if, in the middle of its documents, they are better than the backbone, untouched and trained
    alone, and than one trained prefix of either length, by intervals that exclude zero. A run has one seed, so it can
    disprove a gain, but not prove one.

    Args:
        report: of the quickstart, as `run_quickstart` returns it and `report.json` holds it.

    Returns:
        One sentence for each model with streams and each text that is long enough to have a middle, and one for each
        other text.
    """
    result, titles = [], {name: figures["title"] for name, figures in report["models"].items()}
    for arm, controls in QUICKSTART_CONTROLS.items():
        for text, held in in_the_middle(report["comparisons"], arm, controls).items():
            found = "; ".join(f"{titles[entry['baseline']]}: {format_interval(entry)}" for entry in held)
            result.append(f"{titles[arm]}, in the middle of {text}: {verdict(held)}. Difference to {found}.")
    with_middle = {entry["text"] for entry in report["comparisons"] if entry["where"] == MIDDLE}
    texts = dict.fromkeys(entry["text"] for entry in report["comparisons"])
    return result + [no_middle(text) for text in texts if text not in with_middle]


def plot(report: Report, training_losses: Mapping[str, Sequence[float]], path: Path) -> None:
    """Saves a figure: training losses, their differences from the last row, and paired differences with intervals.

    All rows see the same batches in the same order, so they can be compared step by step.
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
    controls = [(arm, baseline) for arm, baselines in QUICKSTART_CONTROLS.items() for baseline in baselines]
    entries = [entry for entry in report["comparisons"] if (entry["arm"], entry["baseline"]) in controls]
    entries = [entry for entry in entries if entry["low"] is not None]  # one document gives no interval
    for position, entry in enumerate(reversed(entries)):
        mean, low, high = (entry[key] for key in ("difference", "low", "high"))
        color = "tab:green" if high < 0 else "tab:red" if low > 0 else "tab:gray"
        right.errorbar(mean, position, xerr=[[mean - low], [high - mean]], fmt="o", capsize=3, color=color)
        titles = [report["models"][entry[key]]["title"] for key in ("arm", "baseline")]
        labels.append(f"{entry['where']} of {entry['text']}: {titles[0]}\nagainst {titles[1]}")
    right.locator_params(axis="x", nbins=5)
    right.axvline(0, color="black", linewidth=0.8)
    right.set_yticks(range(len(labels)), labels, fontsize=7)
    right.set(title="Difference in loss by document, 95 % interval", xlabel="nats per token; left of 0 is better")
    figure.savefig(path, dpi=150)
