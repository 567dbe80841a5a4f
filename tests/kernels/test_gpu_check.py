"""``make gpu-check``'s program, with tiny sizes and without a GPU: it runs through and writes what it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_dry_run(tmp_path):
    result = run("--dry-run", "--output", str(tmp_path / "gpu.json"))
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["device"] == "dry run"
    assert found["torch"] == torch.__version__
    assert set(found["ceilings"]) == {"bytes_per_second", "operations_per_second"}
    rows = found["rows"]
    kinds = {row["what"] for row in rows}
    operations = {"aggregate", "aggregator", "decode attention", "prefill attention", "prefill attention, both ways"}
    assert operations | {"ceilings", "causal attention without prefix", "decoding", "training"} <= kinds
    assert {row["P"] for row in rows if row["what"] == "decoding"} == {1, 8}
    errors = [row for row in rows if row["what"].startswith("error ")]
    assert {row["dtype"] for row in errors} == {"bfloat16", "float16", "float32"}
    assert all(row["ok"] for row in errors)
    for row in errors:
        if "prefill" not in row["what"]:  # which is merged on a CPU too; of all others, the reference runs
            assert row["fused"] == row["torch"]
    assert (tmp_path / "gpu.png").stat().st_size > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    result = run("--output", str(tmp_path / "gpu.json"))
    assert result.returncode == 1
    assert "needs a CUDA or ROCm device, and torch sees none; --dry-run needs none." in result.stderr
    assert not list(tmp_path.iterdir())
