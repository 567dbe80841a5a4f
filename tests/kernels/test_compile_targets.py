"""Every kernel, as it ships, compiles for each architecture without a GPU, and its code is what it is meant to be."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "compile_targets.py"
PUBLISHED = ROOT / "benchmarks" / "results" / "kernels.json"
KERNELS = {
    "forward_kernel",
    "backward_kernel",
    "few_rows_kernel",
    "finish_kernel",
    "join_kernel",
    "split_kernel",
    "part_kernel",
    "merge_kernel",
}
SHARED_MEMORY = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KiB
# By day one case of each kernel, on one GPU.
SAMPLE = [
    "aggregate P=4 H=2048",
    "aggregator P=8 N=1 H=1536",
    "aggregator P=4 N=16384",
    "decode P=8 B=1 G=2 n=8 D=96 V=96 bfloat16 boolean",
]
CASES = [("sm_90", SAMPLE), *(pytest.param(target, [""], marks=pytest.mark.nightly) for target in SHARED_MEMORY)]
ODD = ("P=5", "H=1 ", "H=1000")  # what a kernel cannot load 16 bytes at a time

# What has no room for blocks in flight beside 64 queries of 256 float32 numbers.
BARE = {(target, "decode P=2 B=1 G=1 n=64 D=256 V=256 float32 none") for target in ("sm_89", "sm_120")}
WARPGROUPS = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}  # the products of four warps together, for 64 queries and more


def queries(case):
    """How many of a case of decode attention share a key/value head."""
    P, n = (int(re.search(rf"{name}=(\d+)", case)[1]) for name in "Pn")
    return P * n if case.endswith("shared") else n


def check_code(row):
    """The main loop of a kernel for NVIDIA's GPUs: wide loads that wait for nothing, matrix instructions, no spills."""
    case, bits = row["case"], {int(width): number for width, number in row["load_bits"].items()}
    assert row["local_in_loop"] == 0, row
    assert not any(row["blocking"]), row
    if any(odd in case for odd in ODD):
        return
    if row["kernel"] == "part_kernel":
        narrow = sum(number for width, number in bits.items() if width < 128)
        assert bits[128] >= 4, row
        of_mask = 0 if case.endswith("none") else 32 if "shared" in case else 4
        assert narrow <= of_mask, row
        assert row["asynchronous"] or (row["target"], case) in BARE, row
    if row["kernel"] in ("few_rows_kernel", "join_kernel"):
        assert set(bits) == {128}, row
    if row["kernel"] == "split_kernel":  # which takes the P numbers of one feature at a time
        size = int(re.search(r"P=(\d+)", case).group(1)) * (32 if "float32" in case else 16)
        assert set(bits) == {min(128, size)}, row
    if row["kernel"] == "few_rows_kernel":
        assert row["asynchronous"], row
    if row["kernel"] in ("part_kernel", "few_rows_kernel") and "float32" not in case:
        assert row["products"], row
    if row["kernel"] == "part_kernel" and queries(case) >= 64 and "float32" not in case:
        assert row["products"] == [WARPGROUPS.get(row["target"], "HMMA")], row
    if row["kernel"] in ("forward_kernel", "backward_kernel", "finish_kernel"):
        assert bits[128] >= 1, row


@pytest.mark.slow
@pytest.mark.parametrize(("target", "only"), CASES)
def test_compiles_without_spills(target, only, tmp_path):
    command = [sys.executable, str(SCRIPT), "--targets", target, "--output", str(tmp_path / "kernels.json")]
    command += ["--only", *only]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["spilled_bytes"] == 0, row
        assert row["shared_bytes"] <= 1024 * SHARED_MEMORY[target], row
        assert row["registers"] <= 512 if target == "gfx942" else 255, row
        assert row["programs"] >= row.get("assumed", 1), row
        assert row["shared_bytes"] <= row.get("assumed_bytes", row["shared_bytes"]), row
        if target != "gfx942":
            check_code(row)
    assert_published(rows, target, is_whole=only == [""])


def assert_published(rows, target, is_whole):
    """The published table has these rows; a kernel that several cases share stands there once, under the first one."""
    published = json.loads(PUBLISHED.read_text())
    assert published["triton"] == triton.__version__
    known = [row for row in published["rows"] if row["target"] == target]
    if is_whole:
        assert rows == known
    known = [{name: value for name, value in row.items() if name != "case"} for row in known]
    for row in rows:
        assert {name: value for name, value in row.items() if name != "case"} in known, f"run {SCRIPT.name}: {row}"


def test_the_published_page_is_the_published_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    table = importlib.import_module("compile_targets").table
    assert PUBLISHED.with_suffix(".md").read_text() == table(json.loads(PUBLISHED.read_text())["rows"]) + "\n"
