"""The tests of kernels on a machine without a GPU: once more, in a process where Triton interprets them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("when", ["not nightly", pytest.param("nightly", marks=pytest.mark.nightly)])
def test_kernel_tests_pass_in_the_interpreter(when):
    """One process for all files: to import torch and transformers takes longer than many a test."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-m",
        f"kernel and {when}",
        "-p",
        "no:cacheprovider",
        KERNELS,
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=KERNELS.parents[1], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout
