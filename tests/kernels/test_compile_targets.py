"""Every kernel, as it ships, compiles for each architecture without a GPU, and spills nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "compile_targets.py"
KERNELS = {
    "forward_kernel",
    "backward_kernel",
    "few_rows_kernel",
    "finish_kernel",
    "split_weight_kernel",
    "many_rows_kernel",
    "part_kernel",
    "merge_kernel",
}
SHARED_MEMORY = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}  # KiB


OTHERS = [pytest.param(target, marks=pytest.mark.nightly) for target in SHARED_MEMORY if target != "sm_90"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", *OTHERS])
def test_compiles_without_spills(target, tmp_path):
    command = [sys.executable, str(SCRIPT), "--targets", target, "--output", str(tmp_path / "kernels.json")]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["spilled_bytes"] == 0, row
        assert row["shared_bytes"] <= 1024 * SHARED_MEMORY[target], row
        assert row["registers"] <= 512 if target == "gfx942" else 255, row
    assert (tmp_path / "kernels.md").read_text().count("\n") == len(rows) + 2
