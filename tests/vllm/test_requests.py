"""One request at a time: what the user is told counts the user's tokens only, and every kind of request is answered."""

import json
import subprocess
import sys

import pytest
import torch

import parscale

LONGEST = 128


@pytest.fixture(scope="module")
def folder(make_folder):
    return make_folder("Qwen2", 4, prefix_length=32)


@pytest.fixture(scope="module")
def model(folder):
    return parscale.load(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llm(folder, serving):
    with serving.engine(folder, max_model_len=LONGEST, block_size=32, max_num_seqs=8, disable_log_stats=False) as llm:
        yield llm


def ask(llm, ids, **arguments):
    from vllm import SamplingParams

    wanted = SamplingParams(**{"temperature": 0, "detokenize": False} | arguments)
    return llm.generate([{"prompt_token_ids": ids}], wanted, use_tqdm=False)[0]


def test_the_longest_text_is_the_users(llm, model, serving):
    """All of `max_model_len` is for tokens; the prefix takes none of it."""
    assert llm.model_config.max_model_len == LONGEST
    ids = serving.prompts([LONGEST - 5])[0]
    output = ask(llm, ids, max_tokens=None, min_tokens=5)
    assert list(output.outputs[0].token_ids) == serving.reference(model, ids, 5)[0]
    assert output.outputs[0].finish_reason == "length"


def test_one_token_too_long(llm, serving):
    with pytest.raises(Exception, match=rf"\b{LONGEST}\b.*\b{LONGEST + 1}\b"):
        ask(llm, serving.prompts([LONGEST + 1])[0], max_tokens=1)
    assert len(ask(llm, serving.prompts([9])[0], max_tokens=1).outputs[0].token_ids) == 1


def test_an_empty_prompt(llm):
    with pytest.raises(Exception, match="empty"):
        ask(llm, [], max_tokens=1)


def test_cached_tokens_are_the_users(llm, serving):
    ids = serving.prompts([100], seed=5)[0]
    assert ask(llm, ids, max_tokens=1).num_cached_tokens == 0
    assert ask(llm, ids, max_tokens=1).num_cached_tokens == 96
    assert ask(llm, ids[:70], max_tokens=1).num_cached_tokens == 64


def test_the_prefix_is_shared(llm, serving):
    """A block of slots is computed once: prompts that have nothing in common find it in the cache."""
    first, second = serving.prompts([20, 20], seed=6)
    ask(llm, first, max_tokens=1)
    before = metric(llm, "prefix_cache_hits")
    ask(llm, second, max_tokens=1)
    assert metric(llm, "prefix_cache_hits") - before == 32


def test_created_cache_tokens_are_the_users(llm, serving):
    ids = serving.prompts([100], seed=10)[0]
    llm.reset_prefix_cache()
    assert [ask(llm, ids, max_tokens=1).num_cache_creation_tokens for _ in range(2)] == [96, 0]
    assert ask(llm, ids[::-1], max_tokens=1).num_cache_creation_tokens == 96


@pytest.mark.parametrize(
    ("tokens", "cached", "computed", "expected"),
    [
        (200, 0, 128, 80),  # the first: a block of 48 slots and 80 tokens
        (200, 128, 128, 0),  # again
        (100, 0, 128, 80),
        (20, 0, 0, 0),  # no whole block
        (300, 128, 256, 128),
        (300, 0, 256, 208),
        (100, 32, 144, 96),  # in blocks of 16: two of the slots' three blocks are still there
        (100, 0, 32, 0),  # written up to the slots alone
    ],
)
def test_slots_are_not_counted(tokens, cached, computed, expected):
    """Of 48 slots and the user's tokens, those found in the cache, and those that it holds afterwards."""
    from vllm.v1.metrics.stats import PrefillStats

    from parscale.integrations.vllm.scheduler import _take_out

    stats = PrefillStats()
    stats.set(48 + tokens, cached, 0)
    stats.finalize(computed)
    _take_out(stats, 48)
    found = max(0, cached - 48)
    assert stats == PrefillStats(tokens, tokens - found, found, found, 0, expected)


def test_one_stream_is_refused(llm, serving):
    """All streams would answer: those with keys of their own have no single one that could."""
    ids = serving.prompts([5])[0]
    for value in (1, 3, "x"):
        with pytest.raises(Exception, match=f"parscale_streams was {value!r}, .*kv='shared' answer .*: leave it out"):
            ask(llm, ids, max_tokens=1, extra_args={"parscale_streams": value})
    assert len(ask(llm, ids, max_tokens=1, extra_args={"other": 1}).outputs[0].token_ids) == 1


def metric(llm, name):
    return next(metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


@pytest.mark.parametrize("length", [1, 2, 40, 100])
@torch.no_grad()
def test_the_prompts_own_logprobs(llm, model, serving, length):
    ids = serving.prompts([length], seed=length)[0]
    output = ask(llm, ids, max_tokens=1, prompt_logprobs=0)
    assert output.prompt_token_ids == ids
    assert len(output.prompt_logprobs) == length
    assert output.prompt_logprobs[0] is None
    got = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
    logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    assert got == pytest.approx(logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist(), abs=1e-4)


@torch.no_grad()
def test_the_best_five(llm, model, serving):
    ids = serving.prompts([33], seed=7)[0]
    step = ask(llm, ids, max_tokens=1, logprobs=5).outputs[0].logprobs[0]
    logprobs = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    best = logprobs.topk(5)
    assert sorted(step, key=lambda token: step[token].rank) == best.indices.tolist()
    assert [step[token].logprob for token in best.indices.tolist()] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("ids", [[0, 5, 9], [7, 7, 8, 3]])
def test_a_penalty_on_repetition_sees_the_users_tokens_only(llm, model, serving, ids):
    """A token that fills a slot would be made less likely."""
    output = ask(llm, ids, min_tokens=12, max_tokens=12, repetition_penalty=1.8)
    assert list(output.outputs[0].token_ids) == serving.reference(model, ids, 12, repetition_penalty=1.8)[0]


def test_several_samples_of_one_prompt(llm, serving):
    ids = serving.prompts([12], seed=8)[0]
    outputs = ask(llm, ids, n=3, temperature=1.0, seed=1, max_tokens=4).outputs
    assert len({tuple(output.token_ids) for output in outputs}) > 1
    again = ask(llm, ids, n=3, temperature=1.0, seed=1, max_tokens=4).outputs
    assert [output.token_ids for output in again] == [output.token_ids for output in outputs]


def test_preempted_requests(folder, model, serving):
    """A cache too small for all: requests are thrown out and computed again, with the same answers."""
    prompts = serving.prompts([60, 61, 62, 63, 64, 65])
    small = {"max_model_len": LONGEST, "block_size": 32, "num_gpu_blocks_override": 12}
    with serving.engine(folder, disable_log_stats=False, **small) as llm:
        outputs = serving.greedy(llm, prompts, 40)
        assert metric(llm, "num_preemptions") > 0
    for ids, output in zip(prompts, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == serving.reference(model, ids, 40)[0]


@pytest.mark.parametrize(
    ("family", "fields"), [("Qwen2", {}), ("Mistral", {"sliding_window": 24})], ids=["slots", "window"]
)
def test_the_scheduler_of_gpus(make_folder, serving, monkeypatch, caplog, family, fields):
    """vLLM runs its asynchronous scheduler there, and not on CPUs; its slots are the same.

    Where that is not Model Runner V2's, no logits processor refuses one stream: a warning says that all answer.
    """
    import vllm.logger
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from parscale.integrations.vllm import scheduler, startup

    vllm.logger._print_warning_once.cache_clear()
    monkeypatch.setattr(scheduler, "_OwnKeysScheduler", scheduler._AsyncOwnKeysScheduler)
    monkeypatch.setattr(startup, "_refuse_one_stream", lambda vllm_config: False)
    folder, ids = make_folder(family, 4, prefix_length=32, **fields), serving.prompts([50], seed=9)[0]
    with serving.engine(folder, max_model_len=LONGEST) as llm:
        assert isinstance(llm.llm_engine.engine_core.engine_core.scheduler, AsyncScheduler)
        monkeypatch.setattr(scheduler.logger, "handlers", [caplog.handler])
        monkeypatch.setattr(scheduler.logger, "propagate", False)
        caplog.set_level("WARNING", scheduler.logger.name)
        output = serving.greedy(llm, [ids], 8)[0]
        assert "parscale_streams" not in caplog.text
        for one in serving.greedy(llm, [ids, ids], 8, extra_args={"parscale_streams": 1}):
            assert one.outputs[0].token_ids == output.outputs[0].token_ids
    assert caplog.text.count("parscale_streams of a request is ignored: streams with keys of their own all answer") == 1
    assert (list(output.outputs[0].token_ids), output.prompt_token_ids) == (serving.reference(folder, ids, 8)[0], ids)


GUESSING = """
import json, sys
from vllm import LLM, SamplingParams
folder, ids, longest, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
guesses = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=longest, skip_tokenizer_init=True,
          speculative_config=guesses, disable_log_stats=False, kv_cache_memory_bytes=2**27)
wanted = SamplingParams(temperature=0, min_tokens=new, max_tokens=new, detokenize=False)
out = llm.generate([{"prompt_token_ids": ids}], wanted, use_tqdm=False)[0].outputs[0]
metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
print(json.dumps([list(out.token_ids), metrics["vllm:spec_decode_num_accepted_tokens"]]))
"""


def test_guesses_from_the_prompt(folder, model, serving, tmp_path):
    """Speculative decoding by n-grams of the text so far; by itself, since vLLM does not start again beside numba."""
    ids, new = serving.prompts([20])[0] * 3, 40
    arguments = [folder, json.dumps(ids), LONGEST, new]
    command = [sys.executable, "-c", GUESSING, *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    tokens, accepted = json.loads(done.stdout.splitlines()[-1])
    assert tokens == serving.reference(model, ids, new)[0]
    assert accepted > 0
