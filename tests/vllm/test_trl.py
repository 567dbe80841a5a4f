"""TRL beside vLLM: GRPO with vLLM as the sampler, which gets the weights after each step, and checkpoints as served."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
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
    command = [
        sys.executable,
        "-P",
        "-c",
        PROGRAM,
        EXAMPLES / "grpo_model.py",
        "--vllm",
        "--steps",
        "4",
        "--max-new-tokens",
        "8",
    ]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    differences = re.findall(r"'sampling/sampling_logp_difference/max': '([\d.e-]+)'", done.stdout)
    assert len(differences) == 4
    assert max(map(float, differences)) < 1e-4
    assert "Qwen2ForCausalLM with 4 streams: reward 0." in done.stdout


@pytest.mark.nightly
@pytest.mark.parametrize("example", ["dpo_chat_model", "grpo_model"])
def test_checkpoints_are_served(example, serving, tmp_path):
    """As the trainer wrote them, the first and the last one, which differ."""
    command = [sys.executable, "-P", EXAMPLES / f"{example}.py", "--steps", "4", "--output", "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "load('run/checkpoint-4') has 4 streams" in done.stdout
    prompts, logprobs = serving.prompts([3, 20, 70]), []
    for step in (2, 4):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        with serving.engine(folder) as llm:
            outputs = serving.greedy(llm, prompts, 10, logprobs=0)
        serving.agree(outputs, folder, 10)
        logprobs.append([output.outputs[0].cumulative_logprob for output in outputs])
    assert logprobs[0] != logprobs[1]
