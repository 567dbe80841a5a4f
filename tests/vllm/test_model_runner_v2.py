"""vLLM's Model Runner V2, which is its default on GPUs: the same answers.

Its own kernels are Triton's and run in Triton's interpreter here, in a process of its own; attention and layers are
those for CPUs.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

import parscale

RUN = """
import json, sys
from types import SimpleNamespace

import triton.backends

triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # the interpreter
from vllm import LLM, SamplingParams

folder, settings, requests = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256, skip_tokenizer_init=True, block_size=32,
          max_num_batched_tokens=64, **settings)
wanted = [SamplingParams(temperature=0, detokenize=False, **further) for _, further in requests]
outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], wanted, use_tqdm=False)
again = llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], wanted, use_tqdm=False)
worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
logprobs = [
    [step[token].logprob for step, token in zip(out.prompt_logprobs[1:], out.prompt_token_ids[1:])]
    if out.prompt_logprobs else None
    for out in outputs
]
print(json.dumps({
    "runner": type(worker.model_runner).__module__,
    "tokens": [list(out.outputs[0].token_ids) for out in outputs],
    "again": [list(out.outputs[0].token_ids) for out in again],
    "cached": [out.num_cached_tokens for out in again],
    "logprobs": logprobs,
}))
"""
V2 = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}


def run(folder, requests, **settings):
    command = [sys.executable, "-c", RUN, str(folder), json.dumps(settings), json.dumps(requests)]
    done = subprocess.run(command, env=os.environ | V2, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"
    return found


def answers(model, serving, requests):
    """Transformers', with all streams or, where a request asks for one, the plain backbone's."""
    found = []
    for ids, further in requests:
        with model.use_streams(None if "extra_args" in further else "default"):
            found.append(serving.reference(model, ids, further["max_tokens"])[0])
    return found


def requests_of(serving, *, single):
    """Of different lengths, one of which asks for its prompt's log-probabilities and some for one stream."""
    prompts = serving.prompts([1, 30, 90, 150, 40], seed=4)
    lengths = [9, 4, 6, 5, 3]
    requests = [(ids, {"min_tokens": new, "max_tokens": new}) for ids, new in zip(prompts, lengths, strict=True)]
    requests[4][1]["prompt_logprobs"] = 0
    for index in (1, 2) if single else ():
        requests[index][1]["extra_args"] = {"parscale_streams": 1}
    return requests


@pytest.mark.parametrize(("kv", "cached"), [("own", [80, 144]), ("shared", [64, 128])])  # behind 16 slots, or none
@torch.no_grad()
def test_answers_are_the_same(make_folder, serving, kv, cached):
    folder = make_folder("Qwen2", 4, kv=kv)
    model = parscale.load(folder, dtype=torch.float32).eval()
    requests = requests_of(serving, single=kv == "shared")
    found = run(folder, requests)
    assert found["tokens"] == answers(model, serving, requests)
    assert found["again"] == found["tokens"]
    assert found["cached"][2:4] == cached
    ids = requests[4][0]
    logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    assert found["logprobs"][4] == pytest.approx([logprobs[i, x].item() for i, x in enumerate(ids[1:])], abs=1e-4)
