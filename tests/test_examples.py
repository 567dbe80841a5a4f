"""Each example runs as a program, quickly, and says what it promises."""

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
ARGUMENTS = {
    "wrap_and_generate": ["--max-new-tokens", "5"],
    "train_with_trainer": ["--steps", "2", "--sequence-length", "32", "--files", "3"],
    "switch_streams": [],
    "post_train": ["--tokens", "512", "--sequence-length", "64", "--eval-tokens", "500"],
    "load_released": ["--max-new-tokens", "5"],
    "lora": ["--steps", "2"],
    "nd_lora": ["--steps", "2", "--sequence-length", "32"],
    "scaling_law": [],
    "sft_chat_model": ["--steps", "2", "--max-new-tokens", "5"],
    "dpo_chat_model": ["--steps", "2"],
    "grpo_model": ["--steps", "1", "--max-new-tokens", "4"],
    "streams_for_each_p": ["--steps", "2", "--sequence-length", "64"],
    "generate_code_samples": ["--max-new-tokens", "5"],
    "three_transforms": [],
    "classify_and_translate": [],
    "serve_and_ask": ["--max-new-tokens", "5"],
    "export_onnx": ["--max-new-tokens", "5", "--model", "BACKBONE"],
}
PROMISES = {
    "wrap_and_generate": "Qwen2ForCausalLM with 4 streams",
    "train_with_trainer": "others: 0)",
    "switch_streams": "the backbone's logits to the last bit: True",
    "post_train": "P = 4, 460,036 parameters were trained",
    "load_released": "Qwen2ForCausalLM: P = 4, T = 48",
    "scaling_law": "Each stream: k = 0.39",
    "lora": "loaded again, the same logits: True",
    "nd_lora": "(low_rank: 163,840, aggregator: 263,428, others: 0)",
    "sft_chat_model": "Qwen2ForCausalLM with 4 streams answers:\nuser: How do I open a file?\nassistant: ",
    "dpo_chat_model": "preferred answers told apart: ",
    "grpo_model": "Qwen2ForCausalLM with 4 streams: reward 0.",
    "streams_for_each_p": "each set loaded as it was trained: True",
    "three_transforms": "MambaForCausalLM with 4 streams wrote 5 tokens",
    "classify_and_translate": "T5ForConditionalGeneration: logits (2, 5, 100), the same when loaded again: True",
    "export_onnx": "the tokens that generate writes: True",
    "serve_and_ask": "\n\n8 tokens in, 5 out",
    "generate_code_samples": r'{"task_id": "Example/0", "solution": "def double(x):\n    \"\"\"Return twice x.\"\"\"\n',
}


def run(programs: Any, name: str, *arguments: str, folder: Path) -> str:
    """An example's standard output; it runs in an empty folder, offline."""
    finished = programs.run(EXAMPLES / f"{name}.py", *arguments, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == ARGUMENTS.keys() | {"pretrain_small_model"}


# By day the next test runs the first; the others do what the tests of serving, export, training and TRL do by day.
NIGHTLY = {"train_with_trainer", "serve_and_ask", "export_onnx", "streams_for_each_p", "post_train", "grpo_model"}
NAMES = [pytest.param(name, marks=pytest.mark.nightly) if name in NIGHTLY else name for name in ARGUMENTS]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_example(name, tmp_path, programs, backbone):
    if "from trl" in (EXAMPLES / f"{name}.py").read_text(encoding="utf-8"):
        pytest.importorskip("trl")  # make test-oldest has none
    arguments = [str(backbone) if argument == "BACKBONE" else argument for argument in ARGUMENTS[name]]
    assert PROMISES[name] in run(programs, name, *arguments, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_trained_model_is_saved_and_read_again(tmp_path, programs):
    options = [*ARGUMENTS["train_with_trainer"], "--output", "trained"]
    printed = run(programs, "train_with_trainer", *options, folder=tmp_path)
    assert "load('trained') has 4 streams" in printed
    printed = run(programs, "load_released", "trained", *ARGUMENTS["load_released"], folder=tmp_path)
    assert "P = 4, T = 48, torch.float32" in printed


def test_streams_apart_are_measured_by_their_correlations():
    """The term of `nd_lora.py`, by correlations that numpy finds; it is 0 for equal streams of independent features."""
    example = runpy.run_path(str(EXAMPLES / "nd_lora.py"))
    P, tokens, features = example["P"], 10, 3
    states = torch.randn(P * 2, tokens // 2, features, generator=torch.Generator().manual_seed(0))
    by_stream = states.double().reshape(P, tokens, features).numpy()
    distances = [
        np.linalg.norm(np.corrcoef(by_stream[p].T, by_stream[q].T)[:features, features:] - np.eye(features))
        for p in range(P)
        for q in range(p + 1, P)
    ]
    assert example["barlow_twins"](states).item() == pytest.approx(np.mean(distances), rel=1e-5)
    independent = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # over four tokens
    assert example["barlow_twins"](independent.repeat(P, 1, 1)).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
@pytest.mark.nightly
def test_rewards_rise(tmp_path, programs):
    """SFT learns the answers, and DPO tells all pairs apart.

    GRPO's reward, over its last three steps, is above that over its first three.
    """
    pytest.importorskip("trl")
    printed = run(programs, "sft_chat_model", folder=tmp_path)
    first, last = map(float, re.findall(r"loss on the answers ([\d.]+), at the end ([\d.]+)", printed)[0])
    assert last < first / 2
    assert ", at the end 100%" in run(programs, "dpo_chat_model", "--steps", "20", folder=tmp_path)
    printed = run(programs, "grpo_model", "--steps", "20", folder=tmp_path)
    first, last = map(float, re.findall(r"reward ([\d.]+), at the end ([\d.]+)", printed)[0])
    assert last > first + 0.1
