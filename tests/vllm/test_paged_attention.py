"""Attention over pages and a prefix, by itself: against one softmax over both, in float64."""

import ast
import importlib
from pathlib import Path

import pytest
import torch

P, G, HEADS, D, T, SIZE = 2, 2, 4, 8, 3, 4  # SIZE: tokens in a block of the cache
SCALE = D**-0.5


@pytest.fixture(autouse=True)
def addresses_of_the_kernel(monkeypatch):
    """vLLM's kernel that merges two parts, for GPUs, takes a token's address from heads and head size, not strides."""
    from parscale.integrations.vllm import shared_attention, windows

    own = windows.merge_attn_states

    def merge(output, prefix_output, prefix_lse, suffix_output, suffix_lse):
        for states in (output, prefix_output, prefix_lse, suffix_output, suffix_lse):
            assert states.is_contiguous()
        own(output, prefix_output, prefix_lse, suffix_output, suffix_lse)

    for module in (shared_attention, windows):
        monkeypatch.setattr(module, "merge_attn_states", merge)


def batch(lengths, new, metadata_class, heads=P * G):
    """A cache of pages in disorder, the keys and values in it by request, and queries for the last tokens of each.

    Each head's keys have a bias, as Qwen2's: their scores are large, and all alike.
    """
    bias = torch.zeros(heads, 1, 2 * D, dtype=torch.float64)
    bias[:, :, :D] = 20 * torch.randn(heads, 1, D)
    blocks = [-(-length // SIZE) for length in lengths]
    places = torch.randperm(sum(blocks)) + 1
    table = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    cache = torch.full((sum(blocks) + 1, heads, SIZE, 2 * D), torch.nan, dtype=torch.float64)
    texts = [torch.randn(heads, length, 2 * D, dtype=torch.float64) + bias for length in lengths]
    for row, (text, number) in enumerate(zip(texts, blocks, strict=True)):
        table[row, :number], places = places[:number], places[number:]
        for position in range(text.shape[1]):
            cache[table[row, position // SIZE], :, position % SIZE] = text[:, position]
    metadata = metadata_class(
        num_actual_tokens=sum(new),
        query_start_loc=torch.tensor([0, *new]).cumsum(0).int(),
        seq_lens=torch.tensor(lengths).int(),
        block_table=table,
        max_query_len=max(new),
        max_seq_len=max(lengths),
        slot_mapping=torch.empty(0, dtype=torch.int64),
        scheduler_metadata=None,
    )
    return cache, texts, metadata, torch.randn(sum(new), P * HEADS, D, dtype=torch.float64)


def attend(query, text, window, prefix=None):
    """The last tokens of a text: `(n, P*heads, D)` and the log-sum-exp `(P*heads, n)`, each key by itself."""
    k, v = text.split(D, dim=-1)  # (P*G, length, D)
    n, length = query.shape[0], text.shape[1]
    distance = torch.arange(length - n, length)[:, None] - torch.arange(length)
    is_seen = (distance >= 0) & (distance < window)
    if prefix is not None:
        k, v = (torch.cat((learned.flatten(0, 1), x), dim=1) for learned, x in zip(prefix, (k, v), strict=True))
        is_seen = torch.cat((torch.ones(n, T, dtype=torch.bool), is_seen), dim=1)
    k, v = (x.repeat_interleave(query.shape[1] // x.shape[0], dim=0) for x in (k, v))
    scores = (query.transpose(0, 1) @ k.transpose(1, 2) * SCALE).masked_fill(~is_seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1), scores.logsumexp(-1)


def flash_attention(**arguments):
    """Stands in for vLLM's, under its signature, which is read: it cannot be imported without a GPU's libraries."""
    import vllm

    source = Path(vllm.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    (function,) = (
        node
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "flash_attn_varlen_func"
    )
    names = [argument.arg for argument in function.args.args]
    required = names[: len(names) - len(function.args.defaults)]
    assert set(required) <= set(arguments) <= set(names)
    return by_hand(**arguments)


def by_hand(*, q, k, v, cu_seqlens_q, seqused_k, block_table, softmax_scale, window_size, causal, **others):
    """Over pages of `(blocks, size, P*G, D)`."""
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
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

    from parscale.integrations.vllm.windows import WindowCpuImpl, WindowFlashImpl

    torch.manual_seed(window)
    new = [1, 6, 4]
    metadata_class = {"cpu": CPUAttentionMetadata, "flash": FlashAttentionMetadata}[program]
    cache, texts, metadata, query = batch([9, 6, 13], new, metadata_class)
    prefix = tuple(torch.randn(P, G, T, D, dtype=torch.float64) for _ in range(2))
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", flash_attention, raising=False)
    dtype, tolerance = {"cpu": (torch.float64, 1e-12), "flash": (torch.float32, 1e-5)}[program]
    # without what its processor has to offer
    impl = object.__new__({"cpu": WindowCpuImpl, "flash": WindowFlashImpl}[program])
    impl.scale, impl.head_size, impl.vllm_flash_attn_version = SCALE, D, 3
    impl.prefix = tuple(x.to(dtype) for x in prefix)
    impl.sliding_window = {"cpu": window, "flash": (window - 1, 0)}[program]
    output = torch.full_like(query, torch.nan, dtype=dtype)
    impl.forward(None, query.to(dtype), None, None, cache.to(dtype), metadata, output)
    expected = [attend(part, text, window, prefix)[0] for part, text in zip(query.split(new), texts, strict=True)]
    torch.testing.assert_close(output.double(), torch.cat(expected), rtol=0, atol=tolerance)


def test_the_cache_is_written_in_plain_order():
    from parscale.integrations.vllm.windows import WindowCpuImpl

    cache = torch.zeros(3, P * G, SIZE, 2 * D)
    key, value = torch.randn(2, 5, P * G, D)
    places = torch.tensor([11, 2, 3, 4, 8])  # block * SIZE + offset
    WindowCpuImpl.do_kv_cache_update(None, None, key, value, cache, places)
    for row, place in enumerate(places.tolist()):
        assert torch.equal(cache[place // SIZE, :, place % SIZE], torch.cat((key[row], value[row]), dim=-1))
    assert cache.count_nonzero() == key.numel() + value.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [0, 5, 20, 50])
def test_scores_of_biased_keys_are_not_rounded(bias, dtype):
    """Against float64: what is left are the roundings of the weights and of the result, however large the scores."""
    from parscale.integrations.vllm.windows import attend_to_prefix

    torch.manual_seed(0)
    query = torch.randn(40, 16, 64).to(dtype)
    keys, values = (torch.randn(2, 2, 48, 64) for _ in range(2))
    keys = (keys + bias * torch.randn(2, 2, 1, 64)).to(dtype)
    mixed, lse = attend_to_prefix(query, keys, values.to(dtype), 64**-0.5)
    exact, exact_lse = attend_to_prefix(query.double(), keys.double(), values.to(dtype).double(), 64**-0.5)
    assert (mixed.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()
    assert (lse.double() - exact_lse).abs().max() <= 1e-5 * (1 + exact_lse.abs().max())


def test_backends_that_count_the_backbones_heads_are_refused():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from parscale.integrations.vllm.startup import BACKENDS, check_backend

    def backend(path):
        module, _, name = path.rpartition(".")
        return type(name, (), {"__module__": module, "get_name": staticmethod(lambda: "FLASH_ATTN")})

    for name in BACKENDS:
        check_backend(backend(AttentionBackendEnum[name].value))
    with pytest.raises(ValueError, match=r"chosen, .*rocm_aiter_fa\.\w+, is not known to take them: give"):
        check_backend(backend(AttentionBackendEnum.ROCM_AITER_FA.value))


def sized_by_the_backbone(name):
    """The attributes of a backend's metadata builder that hold the backbone's number of heads, and are then used."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    spec = importlib.util.find_spec(AttentionBackendEnum[name].value.rpartition(".")[0])
    tree = ast.parse(Path(spec.origin).read_text())
    found = set()
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Builder")):
        own = [node for node in ast.walk(cls) if isinstance(node, ast.Attribute)]
        for node in ast.walk(cls):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                counts = ast.unparse(node.value.func).endswith(("get_num_attention_heads", "get_num_kv_heads"))
                attribute = getattr(node.targets[0], "attr", None)
                used = any(x.attr == attribute and isinstance(x.ctx, ast.Load) for x in own)
                found |= {attribute} if counts and attribute and used else set()
    return found


def test_the_served_backends_ask_the_layers():
    """In the sources of vLLM's wheel: none of them makes anything of the backbone's number of heads."""
    from parscale.integrations.vllm.startup import BACKENDS

    found = {name: sized_by_the_backbone(name) for name in BACKENDS}
    # Triton's: by it the builder decides from which batch on a sequence is not split, and how finely; not a size
    assert found.pop("TRITON_ATTN") == {"num_heads_kv"}
    assert not any(found.values())
    assert sized_by_the_backbone("ROCM_AITER_FA") == {"num_heads_kv"}


def test_other_backends_are_refused():
    from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend

    from parscale.integrations.vllm.windows import window_backend

    with pytest.raises(
        ValueError, match="CPU_ATTN and FLASH_ATTN, and vLLM has chosen FLEX_ATTENTION: give --attention"
    ):
        window_backend(FlexAttentionBackend)


# -- Streams that share keys

STREAMS = 3


@pytest.mark.parametrize("window", [2, 100])
@pytest.mark.parametrize("chosen", [None, [0, 6, 10], [2, 3, 9], []], ids=["all", "last", "some", "none"])
@pytest.mark.parametrize("program", ["cpu", "flash"])
def test_streams_on_one_cache(monkeypatch, program, chosen, window):
    """Stream 0 sees the cache alone; the others their prefix too, on the tokens that are chosen."""
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

    from parscale.integrations.vllm.rows import StreamRows
    from parscale.integrations.vllm.shared_attention import SharedCpuImpl, SharedFlashImpl

    torch.manual_seed(window)
    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", flash_attention, raising=False)
    lengths, new = [9, 6, 13], [1, 6, 4]
    metadata_class = {"cpu": CPUAttentionMetadata, "flash": FlashAttentionMetadata}[program]
    cache, texts, metadata, _ = batch(lengths, new, metadata_class, G)
    N = sum(new)
    owner = torch.tensor([row for row, number in enumerate(new) for _ in range(number)])
    position = torch.cat([torch.arange(length - n, length) for length, n in zip(lengths, new, strict=True)])
    dtype, tolerance = {"cpu": (torch.float64, 1e-12), "flash": (torch.float32, 1e-5)}[program]

    rows = StreamRows(STREAMS, 32)
    places = None if chosen is None else torch.tensor(chosen, dtype=torch.long)
    rows.choose(places, position, metadata.query_start_loc)
    query = torch.randn(N, STREAMS, HEADS, D, dtype=torch.float64)
    extra = query[:, 1:] if places is None else query[places, 1:]
    flat = torch.cat((query[:, 0], extra.flatten(0, 1)))

    impl = object.__new__({"cpu": SharedCpuImpl, "flash": SharedFlashImpl}[program])
    impl.scale, impl.head_size, impl.vllm_flash_attn_version = SCALE, D, 3
    impl.num_heads, impl.num_kv_heads = HEADS, G
    impl.sliding_window = {"cpu": window, "flash": (window - 1, 0)}[program]
    prefix = tuple(torch.randn(STREAMS - 1, G, T, D, dtype=torch.float64) for _ in range(2))
    impl.share(rows, *(x.to(dtype) for x in prefix))
    output = torch.full_like(flat, torch.nan, dtype=dtype)
    impl.forward(None, flat.to(dtype), None, None, cache.to(dtype), metadata, output)

    first, others = rows.split(output.double())
    for token in range(N):
        text = texts[owner[token]][:, : position[token] + 1]
        expected, _ = attend(query[token, :1], text, window)
        torch.testing.assert_close(first[token], expected[0], rtol=0, atol=tolerance)
        at = token if chosen is None else chosen.index(token) if token in chosen else None
        for stream in range(STREAMS - 1 if at is not None else 0):
            own = [x[stream : stream + 1] for x in prefix]
            expected, _ = attend(query[token, stream + 1 : stream + 2], text, window, own)
            torch.testing.assert_close(others[at, stream], expected[0], rtol=0, atol=tolerance)


def test_one_query_of_each_request(monkeypatch):
    """The step that writes: on a CPU all requests at once, whatever the pages behind their ends hold."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata

    from parscale.integrations.vllm.rows import StreamRows
    from parscale.integrations.vllm.shared_attention import SharedCpuImpl

    torch.manual_seed(0)
    lengths = [9, 1, 14]
    cache, texts, metadata, _ = batch(lengths, [1, 1, 1], CPUAttentionMetadata, G)
    rows = StreamRows(STREAMS, 32)
    impl = object.__new__(SharedCpuImpl)
    impl.scale, impl.head_size, impl.num_heads, impl.num_kv_heads, impl.sliding_window = SCALE, D, HEADS, G, -1
    prefix = tuple(torch.randn(STREAMS - 1, G, T, D, dtype=torch.float64) for _ in range(2))
    impl.share(rows, *prefix)
    query = torch.randn(STREAMS * 3, HEADS, D, dtype=torch.float64)
    output = torch.full_like(query, torch.nan)
    impl.forward(None, query, None, None, cache, metadata, output)
    first, others = rows.split(output)
    own_first, own_others = rows.split(query)
    for row, text in enumerate(texts):
        expected, _ = attend(own_first[row : row + 1], text, 100)
        torch.testing.assert_close(first[row], expected[0], rtol=0, atol=1e-12)
        for stream in range(STREAMS - 1):
            own = [x[stream : stream + 1] for x in prefix]
            expected, _ = attend(own_others[row, stream : stream + 1], text, 100, own)
            torch.testing.assert_close(others[row, stream], expected[0], rtol=0, atol=1e-12)


def test_the_cache_holds_stream_0():
    from parscale.integrations.vllm.shared_attention import SharedCpuImpl

    cache, places = torch.zeros(3, G, 4, 2 * D), torch.tensor([11, 2, 3])
    key, value = torch.randn(2, 3 * STREAMS, G, D)
    SharedCpuImpl.do_kv_cache_update(object.__new__(SharedCpuImpl), None, key, value, cache, places)
    for row, place in enumerate(places.tolist()):
        assert torch.equal(cache[place // 4, :, place % 4], torch.cat((key[row], value[row]), dim=-1))
    assert cache.count_nonzero() == 2 * 3 * G * D


def test_other_backends_are_refused_for_shared_keys():
    from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend

    from parscale.integrations.vllm.shared_attention import shared_backend

    with pytest.raises(ValueError, match="served by the attention backends CPU_ATTN and FLASH_ATTN, and vLLM has"):
        shared_backend(FlexAttentionBackend)


def test_rows():
    """Stream 0's rows in front, then those of the others, token by token."""
    from parscale.integrations.vllm.rows import StreamRows

    rows, ids = StreamRows(STREAMS, 8), torch.tensor([10, 11, 12, 13])
    rows.choose(None, ids, None)
    assert rows.spread(ids).tolist() == [10, 11, 12, 13, 10, 10, 11, 11, 12, 12, 13, 13]
    rows.choose(torch.tensor([1, 3]), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 2, 4]))
    spread = rows.spread(ids)
    assert spread.tolist() == [10, 11, 12, 13, 11, 11, 13, 13]
    assert (rows.owners.tolist(), rows.lengths.tolist()) == ([0, 1], [2, 2])
    first, others = rows.split(spread)
    assert (first.tolist(), others.tolist()) == (ids.tolist(), [[11, 11], [13, 13]])


def test_marks_are_taken_back():
    from parscale.integrations.vllm.rows import StreamRows

    rows = StreamRows(STREAMS, 5)
    rows.mark(torch.tensor([True, False, True]))
    rows.mark(torch.tensor([True]))
    assert rows.is_single.tolist() == [True, False, False, False, False]
    rows.mark(None)
    assert not rows.is_single.any()
