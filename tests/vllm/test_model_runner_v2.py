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
import gc, json, sys
from types import SimpleNamespace

import triton.backends

triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))  # the interpreter
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def answers(llm, requests):
    wanted = [SamplingParams(temperature=0, detokenize=False, **further) for _, further in requests]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], wanted, use_tqdm=False)
    again = llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], wanted, use_tqdm=False)
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    logprobs = [
        [step[token].logprob for step, token in zip(out.prompt_logprobs[1:], out.prompt_token_ids[1:])]
        if out.prompt_logprobs else None
        for out in outputs
    ]
    return {
        "runner": type(worker.model_runner).__module__,
        "tokens": [list(out.outputs[0].token_ids) for out in outputs],
        "again": [list(out.outputs[0].token_ids) for out in again],
        "cached": [out.num_cached_tokens for out in again],
        "logprobs": logprobs,
    }


found = []
for folder, requests in json.loads(sys.argv[1]):
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256, skip_tokenizer_init=True, block_size=32,
              max_num_batched_tokens=64, kv_cache_memory_bytes=2**27)
    found.append(answers(llm, requests))
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
print(json.dumps(found))
"""
V2 = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}


@pytest.fixture(scope="module")
def found(make_folder, serving, tmp_path_factory):
    """What a process answers that starts two engines in turn, for streams with their own keys and with shared."""
    runs = [[str(make_folder("Qwen2", 4, kv=kv)), requests_of(serving, kv)] for kv in ("own", "shared")]
    command = [sys.executable, "-c", RUN, json.dumps(runs)]
    cwd = tmp_path_factory.mktemp("v2")
    done = subprocess.run(command, env=os.environ | V2, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True)
    return dict(zip(("own", "shared"), json.loads(done.stdout.splitlines()[-1]), strict=True))


def answers(model, serving, requests):
    """Transformers', with all streams or, where a request asks for one, the plain backbone's."""
    found = []
    for ids, further in requests:
        with model.use_streams(None if "extra_args" in further else "default"):
            found.append(serving.reference(model, ids, further["max_tokens"])[0])
    return found


def requests_of(serving, kv):
    """Of different lengths; one asks for its prompt's log-probabilities and, with shared keys, two for one stream."""
    prompts = serving.prompts([1, 30, 90, 150, 40], seed=4)
    lengths = [9, 4, 6, 5, 3]
    requests = [(ids, {"min_tokens": new, "max_tokens": new}) for ids, new in zip(prompts, lengths, strict=True)]
    requests[4][1]["prompt_logprobs"] = 0
    for index in (1, 2) if kv == "shared" else ():
        requests[index][1]["extra_args"] = {"parscale_streams": 1}
    return requests


@pytest.mark.parametrize(("kv", "cached"), [("own", [80, 144]), ("shared", [64, 128])])  # behind 16 slots, or none
@torch.no_grad()
def test_answers_are_those_of_transformers(make_folder, serving, found, kv, cached):
    model = parscale.load(make_folder("Qwen2", 4, kv=kv), dtype=torch.float32).eval()
    requests, found = requests_of(serving, kv), found[kv]
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert found["tokens"] == answers(model, serving, requests)
    assert found["again"] == found["tokens"]
    assert found["cached"][2:4] == cached
    ids = requests[4][0]
    logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    assert found["logprobs"][4] == pytest.approx([logprobs[i, x].item() for i, x in enumerate(ids[1:])], abs=1e-4)
