"""The pictures show the data: in each committed SVG all points lie where one and the same scale puts the figures."""

import json
import re
import xml.etree.ElementTree as ElementTree
from itertools import chain
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from parscale.scaling_laws import fit, published, published_models, versus

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "docs" / "assets"
RESULTS = ROOT / "benchmarks" / "results"
SVG = "{http://www.w3.org/2000/svg}"
PIXELS = 0.01  # coordinates have six digits behind the point


def law():
    """The published runs by corpus and P."""
    for corpus in ("stack", "pile"):
        points = published(corpus)
        fitted = fit(*points)
        for P in (1, 2, 4, 8):
            chosen = points.streams == P
            span = np.geomspace(points.params.min() / 1.1, points.params.max() * 1.1, 40)
            yield corpus, f"runs-{corpus}-{P}", points.params[chosen], points.losses[chosen]
            yield corpus, f"law-{corpus}-{P}", span, fitted.predict(span, P)


def overhead():
    rows = json.loads((RESULTS / "overhead.json").read_text())["rows"]
    for S in (256, 1024):
        for what in ("prefill", "decode", "train"):
            wanted = {"shape": "narrow", "model": "parscale", "what": what, "S": S}
            found = [row for row in rows if wanted.items() <= row.items()]
            yield S, f"overhead-{S}-{what}", [row["P"] for row in found], [row["ratio"] for row in found]


def cost():
    rows = json.loads((RESULTS / "cost.json").read_text())["rows"]
    for batch in (1, 4):
        found = [row for row in rows if row["batch_size"] == batch]
        for label, key in (("measured", "streams_to_dense"), ("counted", "counted_streams_to_dense")):
            yield batch, f"cost-{batch}-{label}", [row["streams"] for row in found], [row[key] for row in found]


def batch():
    law, shape = fit(*published("stack")), published_models()["1.6B"]
    for along, values in (("batch_size", (1, 2, 4, 8, 16, 32, 64)), ("input_length", (64, 256, 1024, 4096, 16384))):
        for P in (2, 4, 8):
            costs = [versus(law, shape, num_streams=P, hardware="h100", **{along: value}) for value in values]
            yield along, f"{along}-{P}", values, [found.ratio("seconds") for found in costs]


def shared():
    """Ratios beside each other: own and shared, of both prompts, at their places around P."""
    rows = json.loads((RESULTS / "shared.json").read_text())["rows"]
    for what in ("first_token", "further_token", "cache"):
        for index, (kind, S) in enumerate((kind, S) for kind in ("own", "shared") for S in (256, 4096)):
            found = {row["P"]: row[f"{what}_ratio"][kind] for row in rows if row["S"] == S}
            places = np.arange(3) + 0.18 * (index - 1.5)
            yield what, f"{what}-{kind}-{S}", np.exp(places), np.log([found[P] for P in (2, 4, 8)])


def points_in(svg, name):
    """Where a line's points are, or those of markers alone: `(n, 2)`, pixels."""
    (group,) = [node for node in svg.iter(f"{SVG}g") if node.get("id") == name]
    uses = [[float(use.get(axis)) for axis in "xy"] for use in group.iter("{http://www.w3.org/2000/svg}use")]
    if uses:
        return np.array(uses)
    (path,) = group.iter(f"{SVG}path")
    return np.array(re.findall(r"[ML] (\S+) (\S+)", path.get("d")), dtype=float)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("picture", [law, overhead, cost, batch, shared], ids=lambda picture: picture.__name__)
def test_the_points_are_the_data(picture, theme):
    svg = ElementTree.parse(ASSETS / f"{picture.__name__}-{theme}.svg")
    panels: dict[object, list] = {}
    for panel, name, x, y in picture():
        found = points_in(svg, name)
        assert len(found) == len(x), name
        panels.setdefault(panel, []).append((np.log(np.asarray(x, dtype=float)), np.asarray(y, dtype=float), found))
    assert len(panels) == (3 if picture is shared else 2)
    for lines in panels.values():
        x, y, found = (np.concatenate(columns) for columns in zip(*lines, strict=True))
        for data, pixels in ((x, found[:, 0]), (y, found[:, 1])):
            slope, start = np.polyfit(data, pixels, 1)
            assert abs(slope) > 1  # a constant would fit anything
            assert np.abs(slope * data + start - pixels).max() < PIXELS


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_arms_lie_where_their_differences_are(theme):
    """Differences and both ends of their intervals, all on one scale."""
    comparisons = json.loads((RESULTS / "evidence.json").read_text())["comparisons"]
    wanted = {"study": "scratch", "size": "0.1M", "where": "middle", "baseline": "dense"}
    by_arm = {entry["arm"]: entry for entry in comparisons if wanted.items() <= entry.items()}
    svg = ElementTree.parse(ASSETS / f"evidence-{theme}.svg")
    arms = [text.text for text in svg.iter(f"{SVG}text") if text.text in by_arm]
    assert {"P = 4", "prefix", "long prefix", "twin"} < set(arms)
    data, pixels = [], []
    for place, arm in enumerate(arms):
        data += [by_arm[arm][name] for name in ("low", "high", "difference")]
        pixels += [*points_in(svg, f"interval-{place}")[:, 0], *points_in(svg, f"difference-{place}")[:, 0]]
    slope, start = np.polyfit(data, pixels, 1)
    assert abs(slope) > 1
    assert np.abs(slope * np.array(data) + start - pixels).max() < PIXELS


TOKENS = {"h48-l4": 2_500_000, "h96-l4": 2_500_000, "h64-l5": 5_400_000, "h80-l6": 9_700_000}
TOKENS |= {"h96-l7": 16_600_000, "h128-l6": 25_000_000}


def of_seeds(shape, kind="streams", streams=1, length=8):
    """The finished rows of an arm with the first three seeds, by seed."""
    folder = RESULTS / "evidence" / "scratch"
    name = f"{kind}-{shape}-p{streams}-t{length}-n{TOKENS[shape]}-r0.008-s"
    paths = {seed: folder / f"{name}{seed}.json" for seed in range(3)}
    return {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.exists()}


def arms_of_streams(shape):
    """P = 1, 2, 4, as they stand in the picture."""
    return [of_seeds(shape, streams=P) for P in (1, 2, 4)]


def smallest_arms():
    """Those, one prefix, the dense twin, twice the width."""
    return [
        *arms_of_streams("h48-l4"),
        of_seeds("h48-l4", "prefix"),
        of_seeds("h48-l4", "twin", 4),
        of_seeds("h96-l4"),
    ]


def larger_arms(shape):
    """Those, one prefix of T and of 4 T, the dense twin."""
    return [
        *arms_of_streams(shape),
        of_seeds(shape, "prefix"),
        of_seeds(shape, "prefix", length=32),
        of_seeds(shape, "twin", 4),
    ]


def differences(arms):
    """Of each arm, by seed, from the first arm."""
    losses = [{seed: fmean(row["test"]["middle"]) for seed, row in arm.items()} for arm in arms]
    return [[loss - losses[0][seed] for seed, loss in arm.items()] for arm in losses]


def seeds_and_means(svg, size, arms):
    """What a panel with controls shows, and the heights at which it does."""
    data, pixels = [], []
    for index, by_seed in enumerate(differences(arms)):
        data += [*by_seed, *[fmean(by_seed)] * 2]
        pixels += [*points_in(svg, f"seeds-{size}-{index}")[:, 1], *points_in(svg, f"mean-{size}-{index}")[:, 1]]
    return data, pixels


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_losses_over_streams_are_those_of_the_rows(theme):
    """Seeds, means and the law at 0.1M beside the next two sizes; the larger ones below on a scale of their own."""
    svg = ElementTree.parse(ASSETS / f"streams-{theme}.svg")
    data, pixels = seeds_and_means(svg, "0.1M", smallest_arms())
    for size, shape in (("0.2M", "h64-l5"), ("0.4M", "h80-l6")):
        data += [fmean(by_seed) for by_seed in differences(arms_of_streams(shape))]
        pixels += [*points_in(svg, f"streams-{size}")[:, 1]]
    params = [arm[0]["params"] for arm in smallest_arms()]
    law = fit(*published("stack"))
    for P, N in zip((1, 2, 4), params, strict=False):
        worth = np.log(N * (law.k * np.log(P) + 1) / params[0]) / np.log(params[-1] / params[0])
        data.append(worth * fmean(differences(smallest_arms())[-1]))
    pixels += [*points_in(svg, "law-of-the-paper")[:, 1]]
    of_both = [
        seeds_and_means(svg, size, larger_arms(shape)) for size, shape in (("0.7M", "h96-l7"), ("1.0M", "h128-l6"))
    ]
    below = [[*chain.from_iterable(each)] for each in zip(*of_both, strict=True)]
    for values, places in ((data, pixels), below):
        slope, start = np.polyfit(values, places, 1)
        assert slope < -1
        assert np.abs(slope * np.array(values) + start - places).max() < PIXELS


def test_means_over_streams_are_those_of_the_report():
    """The picture's rows are those that the report chose: the same arms at the same rates."""
    comparisons = json.loads((RESULTS / "evidence.json").read_text())["comparisons"]
    wanted = {"study": "scratch", "size": "0.1M", "where": "middle", "baseline": "dense", "seeds": 3}
    reported = {entry["arm"]: entry["difference"] for entry in comparisons if wanted.items() <= entry.items()}
    means = [fmean(by_seed) for by_seed in differences(smallest_arms())]
    for index, arm in ((1, "P = 2"), (2, "P = 4"), (5, "twice as wide")):
        assert means[index] == pytest.approx(reported[arm], abs=1e-5)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_answers_of_tasks_are_those_of_the_rows(theme):
    """Each seed and the mean, of each arm at the rate that the report chose, on one scale in each panel."""
    entries = json.loads((RESULTS / "evidence.json").read_text())["tasks"]
    svg = ElementTree.parse(ASSETS / f"tasks-{theme}.svg")
    panels: dict[str, list] = {}
    for entry in entries:
        if len(entry["seeds"]) > 1:
            panels.setdefault(entry["task"], []).append(entry)
    assert {"add", "sort"} <= panels.keys()
    for task, arms in panels.items():
        assert [arm["arm"] for arm in arms][:3] == ["dense", "P = 2", "P = 4"]
        data, pixels = [], []
        for place, arm in enumerate(arms):
            rows = [
                json.loads(path.read_text())
                for path in (RESULTS / "evidence" / "tasks").glob(f"{task}-{arm['level']}-*.json")
            ]
            by_seed = {
                row["run"]["seed"]: row["test"]["exact"]
                for row in rows
                if row["params"] == arm["params"] and row["run"]["learning_rate"] == arm["learning_rate"]
            }
            exact = [by_seed[seed] for seed in arm["seeds"]]
            data += [*exact, *[fmean(exact)] * 2]
            pixels += [
                *points_in(svg, f"answers-{task}-{place}")[:, 0],
                *points_in(svg, f"answered-{task}-{place}")[:, 0],
            ]
        slope, start = np.polyfit(data, pixels, 1)
        assert slope > 1
        assert np.abs(slope * np.array(data) + start - pixels).max() < PIXELS


@pytest.mark.parametrize("path", sorted(ASSETS.glob("*.svg")), ids=lambda path: path.name)
def test_a_picture_is_whole_and_fetches_nothing(path):
    text = path.read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert not re.search(r"""(href|src)=["'](?!#)|url\((?!#)|@import""", text)
    assert path.with_name(path.name.replace("-light", "-dark")).exists()
