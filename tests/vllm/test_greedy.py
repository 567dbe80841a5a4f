"""vLLM answers what transformers answers, greedily, with the same log-probabilities."""

import itertools

import pytest

FAMILIES = ["Qwen2", "Qwen3", "Llama", "Mistral"]
AROUND_BLOCKS = [n + d for n in (16, 32, 48, 64, 128) for d in (-1, 0, 1)]
LENGTHS = [1, 2, 3, 5, 8, *AROUND_BLOCKS, 100, *range(150, 501, 50), 750, 999, 1000]
NEW = 6
# Each family, each number of streams, and each of the four ways to serve; the other pairs are for the night.
DAILY = [("Qwen2", 4), ("Qwen3", 1), ("Llama", 2), ("Mistral", 2)]
NIGHTLY = [pair for pair in itertools.product(FAMILIES, [1, 2, 4]) if pair not in DAILY]


@pytest.mark.parametrize(
    ("family", "num_streams"), [*DAILY, *(pytest.param(*pair, marks=pytest.mark.nightly) for pair in NIGHTLY)]
)
def test_many_at_once(make_folder, serving, family, num_streams):
    """32 requests of 1 to 1000 tokens; over the table, with and without prefix caching and small chunks."""
    folder = make_folder(family, num_streams)
    number = FAMILIES.index(family) + [1, 2, 4].index(num_streams)
    caching, chunked = number % 2 == 0, number // 2 % 2 == 0
    chunks = {"max_num_batched_tokens": 96} if chunked else {"enable_chunked_prefill": False}
    prompts = serving.prompts(LENGTHS)
    assert len(prompts) == 32
    with serving.engine(folder, enable_prefix_caching=caching, max_num_seqs=32, **chunks) as llm:
        outputs = serving.greedy(llm, prompts, NEW, logprobs=0)
        again = serving.greedy(llm, prompts[-4:], NEW, logprobs=0)
    assert [output.prompt_token_ids for output in outputs] == prompts
    serving.agree(outputs, folder, NEW)
    assert [output.outputs[0].token_ids for output in again] == [output.outputs[0].token_ids for output in outputs[-4:]]
    assert [output.num_cached_tokens > 0 for output in again] == [caching] * 4
