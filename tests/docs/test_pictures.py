"""The pictures show the data: in each committed SVG all points lie where one and the same scale puts the figures."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

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


def points_in(svg, name):
    """Where a line's points are, or those of markers alone: `(n, 2)`, pixels."""
    (group,) = [node for node in svg.iter(f"{SVG}g") if node.get("id") == name]
    uses = [[float(use.get(axis)) for axis in "xy"] for use in group.iter("{http://www.w3.org/2000/svg}use")]
    if uses:
        return np.array(uses)
    (path,) = group.iter(f"{SVG}path")
    return np.array(re.findall(r"[ML] (\S+) (\S+)", path.get("d")), dtype=float)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("picture", [law, overhead, cost, batch], ids=lambda picture: picture.__name__)
def test_the_points_are_the_data(picture, theme):
    svg = ElementTree.parse(ASSETS / f"{picture.__name__}-{theme}.svg")
    panels: dict[object, list] = {}
    for panel, name, x, y in picture():
        found = points_in(svg, name)
        assert len(found) == len(x), name
        panels.setdefault(panel, []).append((np.log(np.asarray(x, dtype=float)), np.asarray(y, dtype=float), found))
    assert len(panels) == 2
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


@pytest.mark.parametrize("path", sorted(ASSETS.glob("*.svg")), ids=lambda path: path.name)
def test_a_picture_is_whole_and_fetches_nothing(path):
    text = path.read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert not re.search(r"""(href|src)=["'](?!#)|url\((?!#)|@import""", text)
    assert path.with_name(path.name.replace("-light", "-dark")).exists()
