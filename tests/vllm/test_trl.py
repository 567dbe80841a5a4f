"""TRL's GRPO with vLLM in the same process as the sampler, which gets the trainer's weights after each step."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "grpo_model.py"
# On a CPU vLLM packs its linear layers and drops the tensors that TRL writes to; and it would round float32 to half.
PROGRAM = """
import runpy, sys
import torch
import vllm._custom_ops
from vllm.platforms.cpu import CpuPlatform

vllm._custom_ops._supports_onednn = False
CpuPlatform.supported_dtypes = [torch.float32]
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.nightly  # two engines start, and four steps of GRPO
def test_samples_are_those_of_the_weights_after_each_step(tmp_path):
    """TRL compares the log-probabilities with which vLLM drew each token with the trainer's own."""
    command = [sys.executable, "-P", "-c", PROGRAM, EXAMPLE, "--vllm", "--steps", "4", "--max-new-tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    differences = re.findall(r"'sampling/sampling_logp_difference/max': '([\d.e-]+)'", done.stdout)
    assert len(differences) == 4
    assert max(map(float, differences)) < 1e-4
    assert "Qwen2ForCausalLM with 4 streams: reward 0." in done.stdout
