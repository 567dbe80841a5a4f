"""The documentation's pictures, as SVG for light and for dark pages, from `results/` and the published runs.

Each line and each set of points bears its name in the file, by which a test finds it and compares it with the data.

    python benchmarks/pictures.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from parscale.scaling_laws import fit, published, published_models, versus

FOLDER = Path(__file__).parents[1] / "docs" / "assets"
RESULTS = Path(__file__).parent / "results"
INK = {"light": "#333333", "dark": "#d7d7d7"}
COLOURS = {  # of P = 1, 2, 4, 8; told apart by people with any colour vision
    "light": ("#5b5b5b", "#0072B2", "#B85000", "#00805E"),
    "dark": ("#bdbdbd", "#56B4E9", "#E69F00", "#2fc79a"),
}
MARKERS = "so^D"
STREAMS = (1, 2, 4, 8)
DEVICE, MODEL, NEW_TOKENS = "h100", "1.6B", 256
BATCHES = (1, 2, 4, 8, 16, 32, 64)
EVIDENCE_SIZE = "0.1M"
EVIDENCE = (  # those of several seeds
    *("prefix", "long prefix", "prefix, embedding", "dense, embedding", "twin", "twice as wide", "average of 4"),
    *("P = 2", "P = 4", "P = 4, shared", "P = 4, shared-window=8", "P = 4, embedding", "P = 2, embedding"),
)
PROMPTS = (64, 256, 1024, 4096, 16384)
SIZES = {"0.1M": (48, 4), "0.2M": (64, 5), "0.4M": (80, 6), "0.7M": (96, 7), "1.0M": (128, 6)}  # width and layers
TRAINED = (1, 2, 4)  # streams, from scratch
# the learning rate is the best of P = 1 and of P = 4
PUBLISHED = {"arm": "streams", "prefix_length": 8, "variant": "", "learning_rate": 8e-3}
SEEDS = (0, 1, 2)
CONTROLS = {  # of the smallest size, without streams
    "one\nprefix": {"arm": "prefix", "streams": 1},
    "as many\nparameters": {"arm": "twin", "streams": 4},
    "twice\nas wide": {"hidden": 96, "streams": 1},
}
LARGER_CONTROLS = {
    "one\nprefix": {"arm": "prefix", "streams": 1},
    "one of\n4 T": {"arm": "prefix", "streams": 1, "prefix_length": 32},
    "as many\nparameters": {"arm": "twin", "streams": 4},
}


def law(colours: Sequence[str]) -> Figure:
    """The published runs and the fitted law, on code and on general text."""
    figure, panels = _panels(2)
    for axes, corpus in zip(panels, ("stack", "pile"), strict=True):
        points = published(corpus)
        fitted = fit(*points)
        span = np.geomspace(points.params.min() / 1.1, points.params.max() * 1.1, 40)
        for P, colour, marker in zip(STREAMS, colours, MARKERS, strict=True):
            chosen = points.streams == P
            axes.plot(span, fitted.predict(span, P), color=colour, linewidth=1, gid=f"law-{corpus}-{P}")
            runs = {"color": colour, "markersize": 4, "label": f"P = {P}", "gid": f"runs-{corpus}-{P}"}
            axes.plot(points.params[chosen], points.losses[chosen], marker, **runs)
        axes.set(xscale="log", xlabel="parameters N", ylabel="loss (nats per token)")
        axes.set_title({"stack": "Stack-V2-Python", "pile": "Pile"}[corpus] + f", k = {fitted.k:.2f}", fontsize=9)
        _ticks(axes.xaxis, (5e8, 1e9, 2e9, 4e9), ["0.5B", "1B", "2B", "4B"])
    panels[0].legend(frameon=False)
    return figure


def overhead(colours: Sequence[str]) -> Figure:
    """Prefill, decoding and a training step with streams, to the plain backbone with as many rows."""
    rows = json.loads((RESULTS / "overhead.json").read_text(encoding="utf-8"))["rows"]
    figure, panels = _panels(2)
    for axes, S in zip(panels, (256, 1024), strict=True):
        for what, colour, marker in zip(("prefill", "decode", "train"), colours[1:], MARKERS[1:], strict=True):
            wanted = {"shape": "narrow", "model": "parscale", "what": what, "S": S}
            found = {row["P"]: row["ratio"] for row in rows if wanted.items() <= row.items()}
            style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1}
            label = "training step" if what == "train" else what
            axes.plot(STREAMS, [found[P] for P in STREAMS], label=label, gid=f"overhead-{S}-{what}", **style)
        axes.axhline(1, linewidth=0.8, linestyle=":", color=colours[0])
        axes.set(xscale="log", xlabel="streams P", ylabel="time, plain backbone = 1", ylim=(0.95, 1.15))
        axes.set_title(f"{S} tokens", fontsize=9)
        _ticks(axes.xaxis, STREAMS, STREAMS)
    panels[0].legend(frameon=False)
    return figure


def cost(colours: Sequence[str]) -> Figure:
    """Measured and counted time with streams to the model of equal loss, on one core."""
    rows = json.loads((RESULTS / "cost.json").read_text(encoding="utf-8"))["rows"]
    figure, panels = _panels(2)
    for axes, batch in zip(panels, (1, 4), strict=True):
        chosen = [row for row in rows if row["batch_size"] == batch]
        P = [row["streams"] for row in chosen]
        for key, label, colour, line in (
            ("streams_to_dense", "measured", colours[2], "-"),
            ("counted_streams_to_dense", "counted", colours[1], "--"),
        ):
            style = {"color": colour, "linestyle": line, "marker": "o", "markersize": 4, "linewidth": 1}
            axes.plot(P, [row[key] for row in chosen], label=label, gid=f"cost-{batch}-{label}", **style)
        axes.axhline(1, linewidth=0.8, linestyle=":", color=colours[0])
        axes.set(xscale="log", xlabel="streams P", ylabel="time, model of equal loss = 1", ylim=(0.8, 4))
        axes.set_title(f"batch {batch}", fontsize=9)
        _ticks(axes.xaxis, P, P)
    panels[0].legend(frameon=False)
    return figure


def batch(colours: Sequence[str]) -> Figure:
    """Counted time with streams to the model of equal loss on a GPU, over batch and over prompt length."""
    fitted, shape = fit(*published("stack")), published_models()[MODEL]
    figure, panels = _panels(2)
    work: dict[str, Any] = {"hardware": DEVICE, "output_length": NEW_TOKENS}
    axis = {"batch_size": BATCHES, "input_length": PROMPTS}
    for axes, (along, values) in zip(panels, axis.items(), strict=True):
        for P, colour, marker in zip(STREAMS[1:], colours[1:], MARKERS[1:], strict=True):
            ratios = [
                versus(fitted, shape, num_streams=P, **(work | {along: value})).ratio("seconds") for value in values
            ]
            style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1}
            axes.plot(values, ratios, label=f"P = {P}", gid=f"{along}-{P}", **style)
        axes.axhline(1, linewidth=0.8, linestyle=":", color=colours[0])
        axes.set(xscale="log", xlabel=along.replace("_", " ").replace("input length", "tokens of prompt"))
        axes.set(ylabel="time, model of equal loss = 1")
        _ticks(axes.xaxis, values, [f"{value:,}" for value in values])
    panels[0].legend(frameon=False)
    return figure


def evidence(colours: Sequence[str]) -> Figure:
    """Arms from scratch against the dense model of their size, in the middle of documents; streams in colour."""
    entries = json.loads((RESULTS / "evidence.json").read_text(encoding="utf-8"))["comparisons"]
    wanted = {"study": "scratch", "size": EVIDENCE_SIZE, "where": "middle", "baseline": "dense"}
    found = {entry["arm"]: entry for entry in entries if wanted.items() <= entry.items() and entry["seeds"] > 1}
    figure = Figure(figsize=(7.4, 0.28 * len(EVIDENCE) + 0.9), layout="constrained")
    axes = figure.add_subplot()
    for place, arm in enumerate(EVIDENCE):
        entry, colour = found[arm], colours[2] if arm.startswith("P") else colours[0]
        axes.plot([entry["low"], entry["high"]], [place] * 2, color=colour, linewidth=1, gid=f"interval-{place}")
        axes.plot([entry["difference"]], [place], "o", color=colour, markersize=4, gid=f"difference-{place}")
    axes.axvline(0, linewidth=0.8, linestyle=":", color=colours[0])
    _ticks(axes.yaxis, range(len(EVIDENCE)), EVIDENCE)
    axes.invert_yaxis()
    axes.set(xlabel="difference of loss from the dense model, nats per byte: the left is better")
    return figure


def streams(colours: Sequence[str]) -> Figure:
    """Loss over P, less that of P = 1 of the same seed: from scratch, middle of documents, controls and the law."""
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    (smallest, between), (larger, largest) = figure.subplots(2, 2, sharey="row")
    _with_controls(smallest, colours, "0.1M", CONTROLS)
    _add_law(smallest, colours)
    smallest.set(title="0.1 million parameters")
    for size, colour, marker in zip(("0.2M", "0.4M"), colours[1:], MARKERS[1:], strict=False):
        differences = [fmean(of_seeds.values()) for of_seeds in _over_seeds(size, {})]
        style = {"color": colour, "marker": marker, "markersize": 5, "markerfacecolor": "none", "linewidth": 1}
        between.plot(range(len(TRAINED)), differences, label=size, gid=f"streams-{size}", **style)
    between.set_title("0.2 and 0.4 million, one seed each")
    between.set_xlim(-0.4, len(TRAINED) - 0.6)
    _ticks(between.xaxis, range(len(TRAINED)), [f"P = {P}" for P in TRAINED])
    _with_controls(larger, colours, "0.7M", LARGER_CONTROLS)
    larger.set_title("0.7 million, P = 4 with one seed")
    _with_controls(largest, colours, "1.0M", LARGER_CONTROLS)
    largest.set_title("1.0 million, P = 2 with one seed")
    for axes in (smallest, between, larger, largest):
        axes.axhline(0, linewidth=0.8, linestyle=":", color=colours[0])
    figure.supylabel("difference of loss from P = 1, nats per byte", fontsize=8)
    for axes in (smallest, between):
        axes.legend(frameon=False, loc="lower left")
    return figure


def _with_controls(axes: Axes, colours: Sequence[str], size: str, controls: dict[str, dict[str, Any]]) -> None:
    """P = 1, 2 and 4 and controls without streams: each seed, and the means."""
    differences = _over_seeds(size, controls)
    places = [*range(len(TRAINED)), *(len(TRAINED) + 0.5 + 1.4 * index for index in range(len(controls)))]
    for index, (place, of_seeds) in enumerate(zip(places, differences, strict=True)):
        colour = colours[1] if index < len(TRAINED) else colours[0]
        dots = {"color": colour, "markersize": 3.5, "alpha": 0.65, "markeredgewidth": 0}
        axes.plot([place] * len(of_seeds), [*of_seeds.values()], "o", gid=f"seeds-{size}-{index}", **dots)
        mean = fmean(of_seeds.values())
        axes.plot([place - 0.22, place + 0.22], [mean] * 2, color=colour, linewidth=2, gid=f"mean-{size}-{index}")
    means = [fmean(of_seeds.values()) for of_seeds in differences[: len(TRAINED)]]
    axes.plot(range(len(TRAINED)), means, color=colours[1], linewidth=1)
    _ticks(axes.xaxis, places, [*(f"P = {P}" for P in TRAINED), *controls])


def _add_law(axes: Axes, colours: Sequence[str]) -> None:
    """What the law says at the smallest size, and what dots and bars are.

    By the law streams equal a dense model with more parameters. Its loss is read off between the dense model and that
    of twice the width, both trained here, in proportion to log N: k alone is the paper's.
    """
    arms = [_rows("0.1M", **run) for run in _arms(CONTROLS)]
    law, params = fit(*published("stack")), [of_arm[0]["params"] for of_arm in arms]
    equal = law.equivalent_params(params[: len(TRAINED)], TRAINED)
    of_wide = fmean(_over_seeds("0.1M", CONTROLS)[-1].values())
    by_law = of_wide * np.log(equal / params[0]) / np.log(params[-1] / params[0])
    axes.plot([], [], "o", color=colours[0], markersize=3.5, label="one seed")
    axes.plot([], [], color=colours[0], linewidth=2, label="mean of the seeds")
    label = f"the paper's law: as a dense model of\n{law.k:.2f} ln P + 1 times the parameters"
    line = {"color": colours[0], "linewidth": 1, "linestyle": "--"}
    axes.plot(range(len(TRAINED)), by_law, label=label, gid="law-of-the-paper", **line)


def tasks(colours: Sequence[str]) -> Figure:
    """How many answers of a task are right, by arm: each seed, and a line at the mean; streams in colour."""
    entries = json.loads((RESULTS / "evidence.json").read_text(encoding="utf-8"))["tasks"]
    by_task: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if len(entry["exact"]) > 1:  # one seed decides nothing
            by_task.setdefault(entry["task"], {})[entry["arm"]] = entry
    arms = list(next(iter(by_task.values())))
    figure = Figure(figsize=(7.4, 2.6), layout="constrained")
    panels = figure.subplots(1, len(by_task), sharey=True, squeeze=False)[0]
    for axes, (task, found) in zip(panels, by_task.items(), strict=True):
        for place, arm in enumerate(arms):
            exact, colour = found[arm]["exact"], colours[2] if arm.startswith("P") else colours[0]
            name = f"{task}-{place}"
            seeds = {"linestyle": "none", "markersize": 4, "markerfacecolor": "none", "gid": f"answers-{name}"}
            axes.plot(exact, [place] * len(exact), "o", color=colour, **seeds)
            mean, ends = fmean(exact), (place - 0.3, place + 0.3)
            axes.plot([mean] * 2, ends, color=colour, linewidth=1.5, gid=f"answered-{name}")
        axes.set(title=f"{task}, {len(exact)} seeds", xlabel="share of right answers")
        axes.set_xlim(-0.05, 1.05)
    _ticks(panels[0].yaxis, range(len(arms)), ["dense, P = 1" if arm == "dense" else arm for arm in arms])
    panels[0].invert_yaxis()
    return figure


def shared(colours: Sequence[str]) -> Figure:
    """Own and shared caches on two cores: first token, further token and bytes, to the plain backbone."""
    rows = json.loads((RESULTS / "shared.json").read_text(encoding="utf-8"))["rows"]
    figure = Figure(figsize=(7.4, 2.9), layout="constrained")
    titles = {
        "first_token": "time to the first token",
        "further_token": "time of a further token",
        "cache": "bytes of the cache",
    }
    panels = figure.subplots(1, len(titles), sharey=True)
    for axes, (what, title) in zip(panels, titles.items(), strict=True):
        for index, (kind, S) in enumerate((kind, S) for kind in ("own", "shared") for S in (256, 4096)):
            chosen = sorted((row for row in rows if row["S"] == S), key=lambda row: row["P"])
            places = [number + 0.18 * (index - 1.5) for number in range(len(chosen))]
            ratios, colour = [row[f"{what}_ratio"][kind] for row in chosen], colours[1 if kind == "own" else 2]
            stems = [max(1, 0.955 * ratio) for ratio in ratios]  # to the marker's edge, for the hollow ones
            axes.vlines(places, 1, stems, color=colour, linewidth=1.2)
            dots = {"color": colour, "markersize": 5, "label": f"{kind}, {S:,} tokens"}
            dots |= {"markerfacecolor": colour if S == 4096 else "none", "gid": f"{what}-{kind}-{S}"}
            axes.plot(places, ratios, "s" if kind == "own" else "o", **dots)
        axes.axhline(1, linewidth=0.8, linestyle=":", color=colours[0])
        axes.set(yscale="log", ylim=(0.9, 10), xlim=(-0.5, len(chosen) - 0.5))
        axes.set_title(title, fontsize=9)
        _ticks(axes.xaxis, range(len(chosen)), [f"P = {row['P']}" for row in chosen])
        _ticks(axes.yaxis, STREAMS, STREAMS)
    panels[0].set_ylabel("plain backbone = 1")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    return figure


def _rows(size: str, **changes: Any) -> dict[int, dict[str, Any]]:
    """Rows from scratch by seed: those of the method as published, but for the changes to their run."""
    hidden, layers = SIZES[size]
    wanted = {**PUBLISHED, "hidden": hidden, "layers": layers} | changes
    return {row["run"]["seed"]: row for row in _finished() if wanted.items() <= row["run"].items()}


def _over_seeds(size: str, controls: dict[str, dict[str, Any]]) -> list[dict[int, float]]:
    """By arm and seed, of the first three, the difference of loss from the dense model of that seed."""
    arms = [_rows(size, **run) for run in _arms(controls)]
    losses = [{seed: fmean(row["test"]["middle"]) for seed, row in rows.items() if seed in SEEDS} for rows in arms]
    return [{seed: loss - losses[0][seed] for seed, loss in of_arm.items() if seed in losses[0]} for of_arm in losses]


def _arms(controls: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [*({"streams": P} for P in TRAINED), *controls.values()]


@cache
def _finished() -> list[dict[str, Any]]:
    paths = sorted((RESULTS / "evidence" / "scratch").glob("[!.]*.json"))
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return [row for row in rows if "test" in row]


PICTURES: dict[str, Callable[[Sequence[str]], Figure]] = {
    "law": law,
    "overhead": overhead,
    "cost": cost,
    "batch": batch,
    "evidence": evidence,
    "streams": streams,
    "tasks": tasks,
    "shared": shared,
}


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(3.7 * count, 2.9), layout="constrained")
    return figure, [figure.add_subplot(1, count, index + 1) for index in range(count)]


def _ticks(axis: Any, places: Sequence[float], labels: Sequence[Any]) -> None:
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_ticks(places)
    axis.set_major_formatter(FuncFormatter(lambda _, index: str(labels[index])))


def style(theme: str) -> dict[str, Any]:
    """Settings of matplotlib: text stays text, the page shines through, the same drawing gives the same bytes."""
    ink = INK[theme]
    colours = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
    faces = {"figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none"}
    spines = {"axes.spines.top": False, "axes.spines.right": False}
    return {**colours, **faces, **spines, "svg.fonttype": "none", "svg.hashsalt": "parscale", "font.size": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER)
    args = parser.parse_args()
    for theme in INK:
        (args.output / f"diagram-{theme}.svg").write_text(diagram(theme), encoding="utf-8")
        for name, draw in PICTURES.items():
            with matplotlib.rc_context(style(theme)):
                draw(COLOURS[theme]).savefig(args.output / f"{name}-{theme}.svg", metadata={"Date": None})


def diagram(theme: str) -> str:
    """The way from tokens to logits, for three streams."""
    ink, (grey, *streams) = INK[theme], COLOURS[theme]
    box = "rx='6' fill='none' stroke-width='1.5'"
    parts = [
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 760 250' font-family='sans-serif' font-size='14'"
        f" fill='{ink}' text-anchor='middle'>",
        "<title>From tokens to logits with three streams</title>",
        f"<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        f"<path d='M0 0 8 4 0 8z' fill='{grey}'/></marker></defs>",
        f"<rect x='10' y='95' width='90' height='60' stroke='{ink}' {box}/>",
        "<text x='55' y='121'>tokens</text><text x='55' y='141' font-size='12'>(B, S)</text>",
        f"<rect x='300' y='25' width='120' height='200' stroke='{ink}' {box}/>",
        "<text x='360' y='15'>one backbone</text>",
    ]
    for index, colour in enumerate(streams):
        y = 40 + 65 * index
        middle = y + 20
        parts += [
            f"<path d='M100 125 C140 125 130 {middle} 168 {middle}' {_arrow(grey)}/>",
            f"<rect x='170' y='{y}' width='92' height='40' stroke='{colour}' {box}/>",
            f"<text x='216' y='{middle + 5}' fill='{colour}'>prefix {index + 1}</text>",
            f"<path d='M262 {middle} H298' {_arrow(grey)}/>",
            f"<path d='M310 {middle} H410' stroke='{colour}' stroke-width='3' fill='none'/>",
            f"<text x='360' y='{middle - 8}' font-size='12' fill='{colour}'>row {index + 1}</text>",
            f"<path d='M420 {middle} C455 {middle} 450 125 483 125' {_arrow(grey)}/>",
        ]
    parts += [
        f"<rect x='485' y='85' width='120' height='80' stroke='{ink}' {box}/>",
        "<text x='545' y='117'>aggregator</text>",
        "<text x='545' y='139' font-size='12'>weights by token</text>",
        f"<path d='M605 125 H643' {_arrow(grey)}/>",
        f"<rect x='645' y='95' width='105' height='60' stroke='{ink}' {box}/>",
        "<text x='697' y='121'>head</text><text x='697' y='141' font-size='12'>logits (B, S, V)</text>",
        "<text x='216' y='243' font-size='12'>learned, each its own</text>",
        "<text x='360' y='243' font-size='12'>(P*B, S), shared weights</text>",
        "<text x='545' y='183' font-size='12'>(P*B, S, H) to (B, S, H)</text>",
        "</svg>\n",
    ]
    return "\n".join(parts)


def _arrow(colour: str) -> str:
    return f"stroke='{colour}' stroke-width='1.5' fill='none' marker-end='url(#tip)'"


if __name__ == "__main__":
    main()
