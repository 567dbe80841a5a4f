"""The programs for a GPU, with tiny sizes and without one: they run through and write what they promise."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_dry_run(programs, tmp_path):
    result = programs.run(BENCHMARKS / "gpu_check.py", "--dry-run", "--output", tmp_path / "gpu.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["device"] == "dry run"
    assert found["torch"] == torch.__version__
    assert set(found["ceilings"]) == {"bytes_per_second", "operations_per_second"}
    rows = found["rows"]
    kinds = {row["what"] for row in rows}
    operations = {"aggregate", "aggregator", "decode attention", "prefill attention", "prefill attention, both ways"}
    others = {"ceilings", "step", "causal attention without prefix", "linear layer", "decoding", "training"}
    assert operations | others <= kinds
    steps = {(row["P"], row["attention"], row["kv"], row["length"]) for row in rows if row["what"] == "step"}
    ways = [(1, "sdpa", "own"), (1, "own_decode", "own")]
    ways += [(P, "sdpa", kv) for P in (2, 4, 8) for kv in ("own", "shared")]
    assert steps == {(*way, length) for way in ways for length in (8, 16, 24)}
    assert rows[1]["what"] == "step"  # the most valuable first
    assert {row["P"] for row in rows if row["what"] == "decoding"} == {1, 8}
    errors = [row for row in rows if row["what"].startswith("error ")]
    assert {row["dtype"] for row in errors} == {"bfloat16", "float16", "float32"}
    assert all(row["ok"] for row in errors)
    for row in errors:
        if "prefill" not in row["what"]:  # which is merged on a CPU too; of all others, the reference runs
            assert row["fused"] == row["torch"]
    assert (tmp_path / "gpu.png").stat().st_size > 0


def test_figures_are_written_as_they_come(tmp_path, monkeypatch):
    """A run that is cut short leaves those that it has found."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bench = importlib.import_module("gpu_bench").Bench(dry=True, output=tmp_path / "gpu.json")
    for number in range(3):
        bench.add("something", number=number)
        assert len(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == number + 1


@pytest.mark.slow
def test_tuning(tmp_path):
    """What ships is tried first, then others, which are right too; the host functions choose as before afterwards."""
    pytest.importorskip("triton")
    options = ("--dry-run", "--only", "N=1", "--output", str(tmp_path / "tune.json"))
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, BENCHMARKS / "tune.py", *options]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads((tmp_path / "tune.json").read_text())
    assert {(row["by"], row["N"]) for row in found["products"]} == {
        (by, N) for by in ("cublas", "cudnn") for N in (20, 40)
    }
    assert all(row["error"] < 0.01 for row in found["products"])
    assert [subject["subject"] for subject in found["subjects"]] == ["aggregator, N=1", "aggregator's end, N=1"]
    for subject in found["subjects"]:
        rows = subject["rows"]
        assert rows[0]["config"]["num_warps"] in (4, 8)
        assert len(rows) == 3
        assert all(row["right"] for row in rows)
        assert len({json.dumps(row["config"]) for row in rows}) >= 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(programs, tmp_path):
    result = programs.run(BENCHMARKS / "gpu_check.py", "--output", tmp_path / "gpu.json", cwd=tmp_path)
    assert result.returncode == 1
    assert "needs a CUDA or ROCm device, and torch sees none; --dry-run needs none." in result.stderr
    assert not list(tmp_path.iterdir())
