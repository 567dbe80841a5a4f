"""Attention with a window and a prefix, by itself: against one softmax over both, in float64."""

from types import SimpleNamespace

import pytest
import torch

P, G, HEADS, D, T, SIZE = 2, 2, 4, 8, 3, 4  # SIZE: tokens in a block of the cache
SCALE = D**-0.5


def batch(lengths, new):
    """A cache of pages in disorder, the keys and values in it by request, and queries for the last tokens of each."""
    blocks = [-(-length // SIZE) for length in lengths]
    places = torch.randperm(sum(blocks)) + 1
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    cache = torch.full((sum(blocks) + 1, P * G, SIZE, 2 * D), torch.nan, dtype=torch.float64)
    texts = [torch.randn(P * G, length, 2 * D, dtype=torch.float64) for length in lengths]
    for row, (text, number) in enumerate(zip(texts, blocks, strict=True)):
        table[row, :number], places = places[:number], places[number:]
        for position in range(text.shape[1]):
            cache[table[row, position // SIZE], :, position % SIZE] = text[:, position]
    metadata = SimpleNamespace(
        num_actual_tokens=sum(new),
        query_start_loc=torch.tensor([0, *new]).cumsum(0).int(),
        seq_lens=torch.tensor(lengths).int(),
        block_table=table,
        max_query_len=max(new),
        max_seq_len=max(lengths),
        use_cascade=False,
        scheduler_metadata=None,
        max_num_splits=0,
    )
    return cache, texts, metadata, torch.randn(sum(new), P * HEADS, D, dtype=torch.float64)


def attend(query, text, window, prefix=None):
    """The last tokens of a text: ``(n, P*heads, D)`` and the log-sum-exp ``(P*heads, n)``, each key by itself."""
    k, v = text.split(D, dim=-1)  # (P*G, length, D)
    n, length = query.shape[0], text.shape[1]
    distance = torch.arange(length - n, length)[:, None] - torch.arange(length)
    is_seen = (distance >= 0) & (distance < window)
    if prefix is not None:
        k, v = (torch.cat((learned.flatten(0, 1), x), dim=1) for learned, x in zip(prefix, (k, v), strict=True))
        is_seen = torch.cat((torch.ones(n, T, dtype=torch.bool), is_seen), dim=1)
    k, v = (x.repeat_interleave(HEADS // G, dim=0) for x in (k, v))
    scores = (query.transpose(0, 1) @ k.transpose(1, 2) * SCALE).masked_fill(~is_seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1), scores.logsumexp(-1)


def flash_attention(*, q, k, v, cu_seqlens_q, seqused_k, block_table, softmax_scale, window_size, causal, **others):
    """Stands in for vLLM's: pages of ``(blocks, size, P*G, D)``."""
    assert (softmax_scale, causal, others["return_softmax_lse"]) == (SCALE, True, True)
    window = q.shape[0] + 10**6 if window_size[0] < 0 else window_size[0] + 1
    assert window_size[1] in (-1, 0)
    parts = []
    for row, length in enumerate(seqused_k.tolist()):
        pages = torch.cat((k, v), dim=-1)[block_table[row, : -(-length // SIZE)]]  # (blocks, size, P*G, 2*D)
        text = pages.flatten(0, 1)[:length].transpose(0, 1)
        parts.append(attend(q[cu_seqlens_q[row] : cu_seqlens_q[row + 1]], text, window))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)


@pytest.mark.parametrize("window", [1, 3, 5, 100])
@pytest.mark.parametrize("program", ["cpu", "flash"])
def test_nothing_hides_the_prefix(monkeypatch, program, window):
    from vllm.v1.attention.backends import fa_utils

    from parscale.integrations.vllm.windows import CpuImpl, FlashImpl

    torch.manual_seed(window)
    new = [1, 6, 4]
    cache, texts, metadata, query = batch([9, 6, 13], new)
    prefix = tuple(torch.randn(P, G, T, D, dtype=torch.float64) for _ in range(2))
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", flash_attention, raising=False)
    dtype, tolerance = {"cpu": (torch.float64, 1e-12), "flash": (torch.float32, 1e-5)}[program]
    impl = object.__new__({"cpu": CpuImpl, "flash": FlashImpl}[program])  # without what its processor has to offer
    impl.scale, impl.head_size, impl.vllm_flash_attn_version = SCALE, D, 3
    impl.prefix = tuple(x.to(dtype) for x in prefix)
    impl.sliding_window = {"cpu": window, "flash": (window - 1, 0)}[program]
    output = torch.full_like(query, torch.nan, dtype=dtype)
    impl.forward(None, query.to(dtype), None, None, cache.to(dtype), metadata, output)
    expected = [attend(part, text, window, prefix)[0] for part, text in zip(query.split(new), texts, strict=True)]
    torch.testing.assert_close(output.double(), torch.cat(expected), rtol=0, atol=tolerance)


def test_the_cache_is_written_in_plain_order():
    from parscale.integrations.vllm.windows import CpuImpl

    cache = torch.zeros(3, P * G, SIZE, 2 * D)
    key, value = torch.randn(2, 5, P * G, D)
    places = torch.tensor([11, 2, 3, 4, 8])  # block * SIZE + offset
    CpuImpl.do_kv_cache_update(None, None, key, value, cache, places)
    for row, place in enumerate(places.tolist()):
        assert torch.equal(cache[place // SIZE, :, place % SIZE], torch.cat((key[row], value[row]), dim=-1))
    assert cache.count_nonzero() == key.numel() + value.numel()


def test_other_backends_are_refused():
    from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend

    from parscale.integrations.vllm.windows import window_backend

    with pytest.raises(
        ValueError, match="CPU_ATTN and FLASH_ATTN, and vLLM has chosen FLEX_ATTENTION: give --attention"
    ):
        window_backend(FlexAttentionBackend)
