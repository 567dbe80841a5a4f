"""The README's Python runs as it stands, in one namespace and an empty folder; its figures are those on file."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert len(BLOCKS) > 5
    namespace: dict[str, object] = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "converted",
        "corpus.txt",
        "parallel",
        "trained",
        "wide-streams",
    ]


def test_the_figures_of_the_quickstart_are_those_on_file():
    report = json.loads((ROOT / "benchmarks" / "results" / "quickstart.json").read_text(encoding="utf-8"))
    for entry in report["comparisons"]:
        assert f"{entry['difference']:+.4f} ({entry['low']:+.4f}, {entry['high']:+.4f})" in README
    for figures in report["models"].values():
        assert all(f"{loss:.4f}" in README for loss in figures["loss"].values())


def test_the_figures_of_the_overhead_are_those_on_file():
    rows = json.loads((ROOT / "benchmarks" / "results" / "overhead.json").read_text())["rows"]
    ratios = {(row["P"], row["S"], row["model"], row["what"]): f"{row['ratio']:.2f}" for row in rows}
    for P, S in sorted({key[:2] for key in ratios}):
        cells = []
        for what in ("prefill", "decode", "train", "train memory"):
            released = ratios.get((P, S, "released", what))
            cells.append(ratios[P, S, "parscale", what] + (f" ({released})" if released else ""))
        assert f"| {P} | {S} | {' | '.join(cells)} |" in README


def test_the_folders_and_examples_are_listed():
    listed = README.partition("## What is where")[2]
    for path in ROOT.glob("examples/*.py"):
        assert path.name in listed
    for folder in ("parscale", "kernels", "checkpoints", "scaling_laws", "examples", "benchmarks", "tests"):
        assert f"\n    {folder}/ " in listed


@pytest.fixture
def table(monkeypatch, capsys):
    """What a program in ``benchmarks/`` prints with ``--table``."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, "--table", *map(str, arguments)])
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_the_figures_of_the_starts_are_those_on_file(table):
    table = table("inits.py")
    rows = re.findall(r'^\| (?:Qwen2|GPT-NeoX), `"\w+"`.*$', README, flags=re.MULTILINE)
    assert len(rows) == 10
    for row in rows:
        before, _, code, prose, _ = [cell.strip() for cell in row.split("|")][2:-1]
        assert all(f"| {figure} |" in table for figure in (before, code, prose)), row


def test_the_figures_of_the_transforms_are_those_on_file(table):
    assert table("transforms.py").strip() in README


def test_the_figures_of_serving_are_those_on_file(table):
    assert table("serving.py", ROOT / "benchmarks" / "results" / "serving.json").strip() in README


def test_the_counts_of_architectures_are_those_on_file():
    page = (ROOT / "docs" / "architectures.md").read_text()
    (classes, built, some, prefix) = map(
        int,
        re.search(
            r"of the (\d+) classes .*?, (\d+) can be\s+built .*?, and (\d+) of.*?; (\d+) by a prefix", README, re.S
        ).groups(),
    )
    counts = {
        row[0]: [int(cell) for cell in row[1:]]
        for row in re.findall(r"^\| ([a-z ]+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.M)
    }
    assert sum(counts["prefix"]) == classes
    assert sum(counts["prefix"][:2]) == built
    assert (counts["any of them"][0], counts["prefix"][0]) == (some, prefix)


def test_the_figures_of_the_memory_are_those_on_file():
    table = (ROOT / "benchmarks" / "results" / "training_memory.md").read_text()
    rows = re.findall(r"^\| (?:Qwen2.5-3B|Llama-3.1-\w+) \|.*$", README, flags=re.MULTILINE)
    assert len(rows) == 6
    assert all(row in table for row in rows)


def test_the_figures_of_recycling_are_those_on_file():
    runs = json.loads((ROOT / "benchmarks" / "results" / "recycle.json").read_text())["runs"]
    assert [run["num_streams"] for run in runs] == [1, 2, 4, 8, 4]
    for run in runs:
        shown = ["against untouched"]
        if run["kind"] == "streams and backbone":
            shown.append("against backbone alone")
        for baseline in shown:
            for found in run[baseline].values():
                assert f"{found['difference']:+.4f} ({found['low']:+.4f}, {found['high']:+.4f})" in README
