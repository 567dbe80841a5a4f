"""Plots of the law, of runs and of costs: matplotlib figures without a window or global state.

Colours are distinguishable with any colour vision and in print; sizes fit one column of a paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from parscale.scaling_laws.configs import Config
from parscale.scaling_laws.costs import Cost, cost
from parscale.scaling_laws.data import Points
from parscale.scaling_laws.law import ParallelScalingLaw
from parscale.scaling_laws.plan import Plan

GIB = 2**30
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"
ENDINGS = (".png", ".pdf", ".svg")


def measured_and_predicted(law: ParallelScalingLaw, points: Points) -> Figure:
    """A law and its runs.

    Left: loss over N, one curve for each P, with the runs. Right: measured and predicted loss, and errors in per cent.
    """
    figure, (left, right) = _figure(2)
    span = np.geomspace(points.params.min() / 1.15, points.params.max() * 1.15, 200)
    for index, streams in enumerate(np.unique(points.streams)):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        chosen = points.streams == streams
        left.plot(span, law.predict(span, streams), color=colour, linewidth=1)
        left.plot(
            points.params[chosen], points.losses[chosen], marker, color=colour, markersize=4, label=f"P = {streams:g}"
        )
        predicted = law.predict(points.params[chosen], streams)
        right.plot(predicted, 100 * (points.losses[chosen] / predicted - 1), marker, color=colour, markersize=4)
    left.set(ylabel="loss (nats per token)")
    _size_axis(left)
    left.set_title(f"E = {law.E:.4g}, A = {law.A:.4g}, alpha = {law.alpha:.4g}, k = {law.k:.4g}", fontsize=8)
    left.legend(frameon=False)
    right.axhline(0, color="0.5", linewidth=0.8)
    right.set(
        xlabel="predicted loss",
        ylabel="measured - predicted (%)",
        title=f"R² = {law.r2:.4f}" if np.isfinite(law.r2) else "",
    )
    return figure


def contours(law: ParallelScalingLaw, points: Points | None = None) -> Figure:
    """Contours of the loss over (N, P), with the runs if given; N covers their range, or 0.3B to 10B."""
    figure, (axes,) = _figure(1)
    low, high = (float(points.params.min()) / 1.3, float(points.params.max()) * 1.3) if points else (3e8, 1e10)
    top = _most_streams(law, max(16.0, float(points.streams.max()) if points else 1.0))
    size, count = np.meshgrid(np.geomspace(low, high, 120), np.geomspace(1, top, 120))
    loss = law.predict(size, count)
    drawn = axes.contourf(size, count, loss, levels=20, cmap="viridis_r")
    figure.colorbar(drawn, ax=axes, label="predicted loss (nats per token)")
    lines = axes.contour(size, count, loss, levels=8, colors="white", linewidths=0.6)
    axes.clabel(lines, fmt="%.3f", fontsize=6)
    if points:
        axes.plot(points.params, points.streams, "k.", markersize=4, label="runs")
        axes.legend(frameon=True, loc="upper right")
    _size_axis(axes)
    _stream_axis(axes, top)
    return figure


def isoloss(law: ParallelScalingLaw, params: Sequence[float] = (5e8, 1e9, 2e9, 4e9), *, streams: float = 16) -> Figure:
    """Curves of equal loss: for each plain model of `params`, the smaller models that reach its loss with P streams.

    With bootstrap draws, they have 90 % bands.
    """
    figure, (axes,) = _figure(1)
    streams = _most_streams(law, streams)
    count = np.geomspace(1, streams, 100)
    for colour, size in zip(COLOURS, params, strict=False):
        axes.plot(
            size / (law.k * np.log(count) + 1),
            count,
            color=colour,
            label=f"{short(size)} plain: {law.predict(size, 1):.3f}",
        )
        if law.draws is not None:
            low, high = np.quantile(law.draws[:, [3]] * np.log(count) + 1, [0.05, 0.95], axis=0)
            axes.fill_betweenx(count, size / high, size / np.maximum(low, 0.01), color=colour, alpha=0.2, linewidth=0)
    _size_axis(axes)
    _stream_axis(axes, streams)
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def cost_bars(costs: Mapping[str, Cost]) -> Figure:
    """Memory and time of each named cost, stacked by part."""
    figure, (left, right) = _figure(2)
    for axes, attribute, unit, label in ((left, "memory", GIB, "memory (GiB)"), (right, "time", 1.0, "time (s)")):
        parts = list(dict.fromkeys(name for item in costs.values() for name in getattr(item, attribute)))
        bottom = np.zeros(len(costs))
        for index, part in enumerate(parts):
            heights = np.array([getattr(item, attribute).get(part, 0.0) for item in costs.values()]) / unit
            axes.bar(
                list(costs), heights, bottom=bottom, color=COLOURS[index % len(COLOURS)], label=part.replace("_", " ")
            )
            bottom += heights
        axes.set_ylabel(label)
        axes.tick_params(axis="x", labelrotation=45 if len(costs) > 4 else 0)
        axes.legend(frameon=False, fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def cost_curves(costs: Mapping[tuple[Any, ...], Cost]) -> Figure:
    """Memory and time over batch size, one curve for each P.

    Keys are (P, batch size), or (P, kind of keys and values, batch size) with a curve for each of both.
    """
    figure, (left, right) = _figure(2)
    for index, curve in enumerate(sorted({key[:-1] for key in costs})):
        batches = sorted(key[-1] for key in costs if key[:-1] == curve)
        drawn = [costs[*curve, batch] for batch in batches]
        label, style = f"P = {', '.join(map(str, curve))}", _style(index)
        left.plot(batches, [item.memory_bytes / GIB for item in drawn], label=label, **style)
        right.plot(batches, [item.seconds for item in drawn], **style)
    for axes, label in ((left, "memory (GiB)"), (right, "time (s)")):
        axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel=label)
        ticks = sorted({key[-1] for key in costs})
        axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes.xaxis.set_minor_formatter(NullFormatter())
        _plain_numbers(axes.yaxis)
    left.legend(frameon=False)
    return figure


def pareto(
    law: ParallelScalingLaw,
    configs: Mapping[str, Config],
    streams: Sequence[int] = (1, 2, 4, 8),
    **workload: Any,
) -> Figure:
    """Predicted loss over memory and over time: a line through all sizes for each P; the lower left edge is the front.

    `workload` as in `cost`.
    """
    figure, (left, right) = _figure(2)
    for index, count in enumerate(streams):
        costs = [cost(config, num_streams=count, **workload) for config in configs.values()]
        losses = [law.predict(item.params, count) for item in costs]
        style = _style(index)
        left.plot([item.memory_bytes / GIB for item in costs], losses, label=f"P = {count}", **style)
        right.plot([item.seconds for item in costs], losses, **style)
    left.set(xscale="log", xlabel="memory (GiB)", ylabel="predicted loss (nats per token)")
    right.set(xscale="log", xlabel="time (s)")
    for axes in (left, right):
        _plain_numbers(axes.xaxis)
    left.legend(frameon=False)
    return figure


def plan_curve(plans: Sequence[Plan]) -> Figure:
    """Predicted loss and size of the best model at each P within a budget (`plan.frontier`)."""
    figure, (left, right) = _figure(2)
    streams = [plan.streams for plan in plans]
    left.plot(streams, [plan.loss for plan in plans], "o-", color=COLOURS[0])
    right.plot(streams, [plan.params / 1e9 for plan in plans], "s-", color=COLOURS[1])
    for axes, label in ((left, "predicted loss (nats per token)"), (right, "parameters N (10⁹)")):
        axes.set(xlabel="streams P", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(streams, [str(count) for count in streams])
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Writes the figure; the suffix (`.png`, `.pdf`, `.svg`) sets the format.

    An error leaves no incomplete file.

    Raises:
        ValueError: another suffix, or none.
    """
    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{path} must end in one of {', '.join(ENDINGS)}, which set the format.")
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=200)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(3.6 * panels, 2.9), layout="constrained")
    return figure, [figure.add_subplot(1, panels, index + 1) for index in range(panels)]


def _style(index: int) -> dict[str, Any]:
    """Colour and marker of the curve with this index."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 4}


def _size_axis(axes: Axes) -> None:
    axes.set(xscale="log", xlabel="non-embedding parameters N")
    _plain_numbers(axes.xaxis)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def short(value: float) -> str:
    """A number of parameters in common notation: 1.57e9 is 1.57B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _plain_numbers(axis: Axis) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _most_streams(law: ParallelScalingLaw, wanted: float) -> float:
    """As many streams as are wanted, or fewer where the law has k below 0 and says nothing of so many."""
    return min(wanted, max(2.0, 0.9 * np.exp(-1 / law.k))) if law.k < 0 else wanted


def _stream_axis(axes: Axes, top: float) -> None:
    axes.set_ylabel("streams P")
    axes.set_yscale("log", base=2)
    ticks = [2**power for power in range(int(np.log2(top)) + 1)]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
