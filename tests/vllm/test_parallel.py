"""Tensor parallelism: two processes give what one gives."""

import pytest
import torch

import parscale


@pytest.mark.parametrize(
    ("family", "fields"),
    [("Qwen2", {}), ("Mistral", {"sliding_window": 24, "num_key_value_heads": 1})],
    ids=["heads shared out", "one head for both, with a window"],
)
def test_two_processes(make_folder, serving, family, fields):
    folder = make_folder(family, 4, **fields)
    prompts = serving.prompts([1, 30, 200])
    model = parscale.load(folder, dtype=torch.float32).eval()
    with serving.engine(folder, tensor_parallel_size=2, max_num_batched_tokens=96) as llm:
        outputs = serving.greedy(llm, prompts, 8, logprobs=0)
    for ids, output in zip(prompts, outputs, strict=True):
        tokens, logprobs = serving.reference(model, ids, 8)
        answer = output.outputs[0]
        assert list(answer.token_ids) == tokens
        got = [step[token].logprob for step, token in zip(answer.logprobs, tokens, strict=True)]
        assert got == pytest.approx(logprobs, abs=1e-4)
