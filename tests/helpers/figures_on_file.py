"""What pages say, and what the files of the benchmarks hold."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def page(name):
    """The text of a page of the documentation."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def on_file(name):
    """The contents of a JSON file that a benchmark wrote."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def with_interval(entry):
    """A difference with its interval, as pages write it."""
    return f"{entry['difference']:+.4f} ({entry['low']:+.4f}, {entry['high']:+.4f})"
