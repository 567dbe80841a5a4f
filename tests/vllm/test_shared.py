"""Streams that share keys and values: greedy answers of transformers, on the plain backbone's cache."""

import pytest
import torch

import parscale

NEW = 6
LENGTHS = [1, 2, 15, 16, 17, 31, 33, 100, 300]
WINDOW = {"sliding_window": 24}
DAILY = [("Qwen2", 4, {}), ("Mistral", 2, WINDOW)]
NIGHTLY = [("Qwen3", 4, {}), ("Llama", 2, {}), ("Llama", 8, {}), ("Mistral", 4, {})]
ONE = {"extra_args": {"parscale_streams": 1}}


@pytest.mark.parametrize(
    ("family", "num_streams", "fields"), [*DAILY, *(pytest.param(*case, marks=pytest.mark.nightly) for case in NIGHTLY)]
)
def test_many_at_once(make_folder, serving, family, num_streams, fields):
    """In small chunks, with answers and prompts in one step; then from the cache."""
    folder = make_folder(family, num_streams, kv="shared", **fields)
    prompts = serving.prompts(LENGTHS)
    with serving.engine(folder, max_num_batched_tokens=64, block_size=32) as llm:
        outputs = serving.greedy(llm, prompts, NEW, logprobs=0)
        again = serving.greedy(llm, prompts[-2:], NEW, logprobs=0)
    serving.agree(outputs, folder, NEW)
    serving.agree(again, folder, NEW)
    assert all(output.num_cached_tokens > 0 for output in again)


@pytest.fixture(scope="module")
def folder(make_folder):
    return make_folder("Qwen2", 4, kv="shared")


@pytest.fixture(scope="module")
def model(folder):
    return parscale.load(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llm(folder, serving):
    with serving.engine(folder, max_model_len=256, block_size=32) as llm:
        yield llm


def ask(llm, requests, **arguments):
    """The tokens that are answered to pairs of a prompt and further parameters, all at once; and the outputs."""
    from vllm import SamplingParams

    common = {"temperature": 0, "min_tokens": NEW, "max_tokens": NEW, "detokenize": False} | arguments
    wanted = [SamplingParams(**common | further) for _, further in requests]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], wanted, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], outputs


def expected(model, serving, ids, streams=True, new=NEW):
    with model.use_streams("default" if streams else None):
        return serving.reference(model, ids, new)[0]


def test_requests_with_one_stream_beside_others(llm, model, serving):
    """Each runs as if it were alone, and their answers differ."""
    prompts = serving.prompts([40, 41, 42, 43], seed=1)
    single = [False, True, True, False]
    requests = [(ids, ONE if one else {}) for ids, one in zip(prompts, single, strict=True)]
    tokens, _ = ask(llm, requests)
    assert tokens == [expected(model, serving, ids, not one) for ids, one in zip(prompts, single, strict=True)]
    assert tokens[1] != expected(model, serving, prompts[1])


def test_requests_with_one_stream_alone(llm, model, serving):
    ids = serving.prompts([50], seed=2)[0]
    assert ask(llm, [(ids, ONE)])[0] == [expected(model, serving, ids, False)]


@pytest.mark.parametrize("first", [{}, ONE], ids=["streams", "backbone"])
def test_each_goes_on_from_what_the_other_has_read(llm, model, serving, first):
    """The blocks hold the plain backbone's keys and values, so that it does not matter who has filled them."""
    ids = serving.prompts([100], seed=3 + len(first))[0]
    second = {} if first else ONE
    ask(llm, [(ids, first)])
    tokens, (output,) = ask(llm, [(ids, second)])
    assert output.num_cached_tokens == 96
    assert tokens == [expected(model, serving, ids, not second)]


def test_finished_and_moved_requests(llm, model, serving):
    """Answers of different lengths: the batch closes its gaps, and each request keeps its number of streams."""
    prompts = serving.prompts([20, 21, 22, 23, 24, 25], seed=5)
    lengths, single = [2, 9, 3, 7, 2, 12], [True, False, True, True, False, False]
    requests = [
        (ids, (ONE if one else {}) | {"min_tokens": new, "max_tokens": new})
        for ids, new, one in zip(prompts, lengths, single, strict=True)
    ]
    tokens, _ = ask(llm, requests)
    wanted = zip(prompts, lengths, single, strict=True)
    assert tokens == [expected(model, serving, ids, not one, new) for ids, new, one in wanted]


@torch.no_grad()
def test_the_prompts_own_logprobs(llm, model, serving):
    """All streams run on all of such a prompt, beside one of another request; with one stream only it runs."""
    ids, other = serving.prompts([70, 60], seed=6)
    requests = [(ids, {"prompt_logprobs": 0}), (other, {}), (ids, {"prompt_logprobs": 0, **ONE})]
    tokens, outputs = ask(llm, requests)
    assert tokens[1] == expected(model, serving, other)
    for output, streams in ((outputs[0], "default"), (outputs[2], None)):
        with model.use_streams(streams):
            logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        wanted = [logprobs[i, token].item() for i, token in enumerate(ids[1:])]
        got = [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
        assert got == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("value", [0, 2, 4, True, "1"])
def test_another_number_of_streams(llm, serving, value):
    with pytest.raises(Exception, match=f"parscale_streams is 1, .* was {value!r}: leave it out"):
        ask(llm, [(serving.prompts([5])[0], {"extra_args": {"parscale_streams": value}})])


def rows_of(llm, requests):
    """How many rows the first layer has in each step."""
    seen = []

    def watch(model):
        hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
        return hook

    (hook,) = llm.apply_model(watch)
    try:
        ask(llm, requests)
    finally:
        hook.remove()
    return seen


def test_a_prompt_runs_with_one_row_for_each_token(llm, serving):
    """And its last token with P of them, as each new one does."""
    first, second = serving.prompts([50, 60], seed=7)
    assert rows_of(llm, [(first, {})]) == [50 + 3, *[4] * (NEW - 1)]
    assert rows_of(llm, [(second, ONE)]) == [60, *[1] * (NEW - 1)]


@pytest.mark.parametrize("kv", ["own", "shared"])
def test_blocks_of_the_cache(make_folder, serving, tmp_path_factory, tiny, kv):
    """As many as the plain backbone has in the same memory, and not a P-th of them."""
    plain = tmp_path_factory.mktemp("plain")
    tiny("Qwen2").save_pretrained(plain)
    numbers = []
    for folder in (plain, make_folder("Qwen2", 4, kv=kv)):
        with serving.engine(folder, max_model_len=256, block_size=32) as llm:
            numbers.append(llm.llm_engine.vllm_config.cache_config.num_gpu_blocks)
    assert numbers[0] == numbers[1] * (1 if kv == "shared" else 4)


def test_two_processes(folder, serving):
    prompts = serving.prompts([1, 30, 200])
    with serving.engine(folder, tensor_parallel_size=2, max_num_batched_tokens=96) as llm:
        outputs = serving.greedy(llm, prompts, NEW, logprobs=0)
    serving.agree(outputs, folder, NEW)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "--speculative-config with shared"),
        ({"kv_cache_dtype": "fp8"}, "that share keys and values are served without --kv-cache-dtype fp8"),
    ],
)
def test_settings_that_shared_keys_do_not_support_are_refused(folder, serving, arguments, match):
    with pytest.raises(ValueError, match=match), serving.engine(folder, **arguments):
        pass


def test_requests_that_come_go_and_move():
    """As vLLM tells a logits processor: gone first, then come, then moved or swapped."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from parscale.integrations.vllm.sampling import BatchOptions, RequestOptions

    def update(removed=(), added=(), moved=()):
        batch.update(BatchUpdate(batch_size=4, removed=removed, added=added, moved=moved))
        return batch.of(4)

    batch, every = BatchOptions(), RequestOptions()
    single, prompt = RequestOptions(single=True), RequestOptions(prompt=True)
    params = [SamplingParams(), SamplingParams(**ONE), SamplingParams(prompt_logprobs=1)]
    assert update(added=[(i, x, [], []) for i, x in enumerate(params)]) == [every, single, prompt, every]
    assert update(moved=[(1, 2, MoveDirectionality.SWAP)]) == [every, prompt, single, every]
    assert update([0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)]) == [single, prompt, every, every]
    assert update([1], added=[(1, params[1], [], [])]) == [single, single, every, every]
    assert update([0, 1]) == [every] * 4
