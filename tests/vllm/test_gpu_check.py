"""The part of the check of a GPU that needs vLLM, with tiny sizes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


@pytest.mark.nightly
@pytest.mark.slow
def test_dry_run_of_serving(tmp_path):
    """Each engine answers each number of requests, and streams are compared with the plain backbone."""
    command = [sys.executable, SCRIPT, "--dry-run", "--only", "serving", "--output", tmp_path / "gpu.json"]
    environment = os.environ | {"VLLM_CPU_CI_ENV": "1"}  # vLLM's own models are not compiled to C++
    done = subprocess.run(list(map(str, command)), env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert not any({"failed", "left_out"} & set(row) for row in rows)
    engines = [(1, "plain"), (2, "own"), (2, "shared")]
    assert [(row["P"], row["kv"]) for row in rows if row["what"] == "vLLM is ready"] == engines
    served = [row for row in rows if row["what"] == "serving"]
    assert [(row["P"], row["kv"], row["requests"]) for row in served] == [(*e, n) for e in engines for n in (1, 8, 3)]
    for row in served:
        assert row["tokens_per_second"] > 0
        assert ("tokens_per_second_to_P1" in row) == (row["P"] > 1)
