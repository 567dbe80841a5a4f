"""Attention of one new token over prefix and cache, against one softmax over both in float64."""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from parscale.kernels import decode_attention, pieces, shared_decode_attention

INF = float("inf")
BIAS = 5.0  # of keys


class Shape(NamedTuple):
    P: int
    B: int
    G: int
    n: int  # queries of a key/value head
    D: int
    Dv: int
    T: int
    K: int


SHAPES = [
    Shape(1, 1, 1, 1, 4, 4, 1, 1),
    Shape(2, 3, 2, 4, 8, 8, 5, 7),
    Shape(3, 2, 1, 6, 15, 15, 3, 100),  # one key/value head for all, odd sizes
    Shape(4, 1, 8, 1, 16, 16, 48, 33),  # no grouping
    Shape(2, 2, 4, 1, 24, 16, 5, 9),  # values of another size than keys
    Shape(8, 2, 2, 2, 64, 64, 48, 257),
]
MASKS = [
    "none",
    "boolean",
    "boolean, one row",
    "boolean, per head",
    "boolean, per head, one row",
    "additive -inf",
    "additive smallest",
    "additive, per head",
    "nothing cached",
    "nothing cached, -inf",
]


def tensors(shape, dtype=torch.float64, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    R = shape.P * shape.B
    bias = BIAS * draw(1, shape.G, 1, shape.D)  # as Qwen2's keys have, whose scores are large and nearly alike
    return (
        draw(R, shape.G * shape.n, 1, shape.D) * scale,
        draw(R, shape.G, shape.K, shape.D) + bias,
        draw(R, shape.G, shape.K, shape.Dv),
        draw(shape.P, shape.G, shape.T, shape.D) + bias,
        draw(shape.P, shape.G, shape.T, shape.Dv),
    )


def make_mask(kind, shape, dtype=torch.float64):
    """A mask over prefix and cache, open over the prefix."""
    if kind == "none":
        return None
    rows = 1 if "one row" in kind else shape.P * shape.B
    heads = shape.G * shape.n if "per head" in kind else 1
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(rows, heads, 1, shape.T + shape.K, generator=generator) < 0.6
    if "nothing" in kind:
        seen = torch.zeros_like(seen)
    seen[..., : shape.T] = True
    if kind == "additive, per head":
        return torch.randn(seen.shape, generator=generator, dtype=torch.float64).to(dtype)
    if "-inf" in kind or "smallest" in kind:
        least = -INF if "-inf" in kind else torch.finfo(dtype).min
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, least)
    return seen


def joined(query, key, value, prefix_k, prefix_v):
    """Keys and values of every row and head, prefix first."""
    rows, heads = query.shape[0] // prefix_k.shape[0], query.shape[1] // key.shape[1]
    for prefix, states in ((prefix_k, key), (prefix_v, value)):
        whole = torch.cat([prefix.repeat_interleave(rows, dim=0), states], dim=2)
        yield whole.repeat_interleave(heads, dim=1)


def dense(query, key, value, prefix_k, prefix_v, mask, scaling=None):
    query, key, value, prefix_k, prefix_v = (x.double() for x in (query, key, value, prefix_k, prefix_v))
    keys, values = joined(query, key, value, prefix_k, prefix_v)
    scores = torch.einsum("rhsd,rhkd->rhsk", query, keys) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None:
        scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask
    return torch.einsum("rhsk,rhkd->rhsd", scores.softmax(-1), values)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_one_softmax_over_prefix_and_cache(shape, kind):
    inputs, mask = tensors(shape), make_mask(kind, shape)
    output = decode_attention(*inputs, mask)
    assert output.shape == (shape.P * shape.B, shape.G * shape.n, 1, shape.Dv)
    torch.testing.assert_close(output, dense(*inputs, mask), rtol=1e-12, atol=1e-12)


def test_scaling_is_a_factor_on_the_scores():
    inputs = tensors(SHAPES[1])
    torch.testing.assert_close(
        decode_attention(*inputs, None, scaling=0.7), dense(*inputs, None, scaling=0.7), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["none", "boolean", "additive smallest", "nothing cached"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 4.0])  # of the queries: flat and peaked weights
def test_is_as_exact_as_torch(dtype, kind, scale):
    """The largest and the mean error, over many draws, against those of torch's own attention in the same precision."""
    errors = {"own": [], "torch": []}
    for shape in SHAPES[1:]:
        for seed in range(4):
            inputs = tensors(shape, dtype, seed, scale)
            mask = make_mask(kind, shape, dtype)
            exact = dense(*inputs, mask)
            own = decode_attention(*inputs, mask)
            assert own.dtype == dtype
            keys, values = joined(*inputs)
            theirs = nn.functional.scaled_dot_product_attention(inputs[0], keys, values, attn_mask=mask)
            errors["own"].append((own - exact).abs().flatten())
            errors["torch"].append((theirs - exact).abs().flatten())
    own, theirs = (torch.cat(errors[name]) for name in ("own", "torch"))
    # float32 has other orders of summation only; its largest of 40,000 errors varies with them
    assert own.max() <= (4 if dtype == torch.float32 else 2) * theirs.max()
    assert own.mean() <= 2 * theirs.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_pieces_change_nothing(dtype, monkeypatch):
    """Half-precision caches are read in pieces: here of seven keys, and the last one shorter."""
    shape = Shape(2, 2, 2, 2, 16, 16, 5, 33)
    inputs, mask = tensors(shape, dtype), make_mask("boolean", shape)
    whole = decode_attention(*inputs, mask)
    monkeypatch.setattr(pieces, "PIECE", 7 * shape.P * shape.B * shape.G * shape.D)
    if dtype == torch.float32:
        assert torch.equal(decode_attention(*inputs, mask), whole)
    else:  # sums in another order, in float32, then one rounding
        torch.testing.assert_close(decode_attention(*inputs, mask), whole, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("function", [decode_attention, shared_decode_attention])
def test_a_token_of_the_cache_with_more_numbers_than_a_piece(function, monkeypatch):
    """It is a piece by itself."""
    inputs = tensors(Shape(2, 2, 2, 1, 4, 4, 3, 6), torch.bfloat16)
    if function is shared_decode_attention:  # whose cache has one row for all streams
        inputs = (inputs[0], *(x[:2] for x in inputs[1:3]), *inputs[3:])
    whole = function(*inputs, None)
    monkeypatch.setattr(pieces, "PIECE", 1)
    torch.testing.assert_close(function(*inputs, None), whole, rtol=0, atol=2**-7)


@pytest.mark.parametrize("function", [decode_attention, shared_decode_attention])
def test_only_a_cpu_reads_in_pieces(function, monkeypatch):
    """They are for its caches. On a GPU each would be a launch."""
    inputs = tensors(Shape(2, 2, 2, 1, 4, 4, 3, 6), torch.bfloat16)
    if function is shared_decode_attention:
        inputs = (inputs[0], *(x[:2] for x in inputs[1:3]), *inputs[3:])
    monkeypatch.setattr(pieces, "PIECE", 1)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        function(*inputs, None, impl="reference")
    products = {event.key: event.count for event in found.key_averages()}["aten::bmm"]
    assert products == 4  # keys and values, of prefix and cache


def test_tokens_beyond_the_length_may_be_anything():
    """Also in the backward pass, whose gradients for them are zero."""
    inputs, length = tensors(SHAPES[1]), torch.tensor([0, 1, 3, 6, 7, 9])
    beyond = (torch.arange(SHAPES[1].K) >= length[:, None])[:, None, :, None]  # (R, 1, K, 1)
    results = []
    for value in (0.0, float("nan"), INF):
        own = [x.clone() for x in inputs]
        for x in own[1:3]:
            x.masked_fill_(beyond, value)
        output = decode_attention(*(x.requires_grad_() for x in own), None, length=length)
        results.append([output, *torch.autograd.grad(output.square().sum(), own)])
    for found in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(found, results[0], strict=True))
    assert not results[0][2].masked_select(beyond).any()


def test_mixed_precision_of_query_and_cache():
    """A cache may hold another dtype than the query has (autocast, a rotary embedding in float32)."""
    query, key, value, prefix_k, prefix_v = tensors(SHAPES[1], torch.float32)
    output = decode_attention(query, key.bfloat16(), value.bfloat16(), prefix_k, prefix_v, None)
    exact = dense(query, key.bfloat16(), value.bfloat16(), prefix_k, prefix_v, None)
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"softcap": 50.0}], ids=["separate scores", "joined keys"])
def test_autocast_rounds_nothing(options):
    """Neither forward nor backward: scores of biased keys in bfloat16 would give errors of some percent."""
    inputs = [x.requires_grad_() for x in tensors(SHAPES[1], torch.float32)]
    outputs = [decode_attention(*inputs, None, **options)]
    with torch.autocast("cpu", torch.bfloat16):
        outputs.append(decode_attention(*inputs, None, **options))
    assert torch.equal(*outputs)
    for own, other in zip(*(torch.autograd.grad(x.square().sum(), inputs) for x in outputs), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("kind", ["none", "boolean, per head", "additive -inf", "additive, per head", "nothing cached"])
def test_gradients(kind):
    shape = Shape(2, 2, 2, 2, 3, 4, 2, 3)
    inputs, mask = [x.requires_grad_() for x in tensors(shape)], make_mask(kind, shape)
    assert torch.autograd.gradcheck(lambda *x: decode_attention(*x, mask, scaling=0.9), inputs)
    if kind == "additive, per head":  # a bias may be learned
        mask.requires_grad_()
        assert torch.autograd.gradcheck(lambda bias: decode_attention(*inputs, bias), [mask])


def test_gradients_of_hidden_keys_are_zero():
    """A key that the mask hides gets an exact zero, not a NaN, whichever way it is hidden."""
    shape = SHAPES[1]
    for kind in ("nothing cached", "nothing cached, -inf"):
        inputs = [x.requires_grad_() for x in tensors(shape)]
        decode_attention(*inputs, make_mask(kind, shape)).sum().backward()
        assert inputs[1].grad.eq(0).all()
        assert inputs[2].grad.eq(0).all()
        assert inputs[3].grad.isfinite().all()
        assert inputs[3].grad.ne(0).any()


@pytest.mark.parametrize("kind", ["none", "boolean"])
def test_under_vmap(kind):
    shape = SHAPES[1]
    many = [torch.stack(x) for x in zip(*(tensors(shape, seed=seed) for seed in range(3)), strict=True)]
    mask = make_mask(kind, shape)
    mapped = torch.vmap(lambda *x: decode_attention(*x, mask))(*many)
    one_by_one = torch.stack([decode_attention(*(x[i] for x in many), mask) for i in range(3)])
    torch.testing.assert_close(mapped, one_by_one, rtol=1e-12, atol=1e-12)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_compile(dtype):
    """In one graph, for a cache that grows, without a new graph for each length."""
    torch._dynamo.reset()
    compiled = torch.compile(decode_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for length in (7, 8, 30):
        shape = SHAPES[1]._replace(K=length)
        inputs, mask = tensors(shape, dtype), make_mask("boolean", shape)
        expected = decode_attention(*inputs, mask)
        torch.testing.assert_close(
            compiled(*inputs, mask), expected, rtol=2**-7 if dtype != torch.float32 else 1e-6, atol=1e-6
        )
    assert graphs["unique_graphs"] - before == 1


def test_a_query_that_is_a_view():
    """As layers hand it over: `(R, 1, heads, D)` transposed, and a cache that is a slice of a longer one."""
    shape = SHAPES[1]
    query, key, value, prefix_k, prefix_v = tensors(shape)
    as_view = query.transpose(1, 2).contiguous().transpose(1, 2)
    key = torch.cat([key, key], dim=2)[:, :, : shape.K]
    value = torch.cat([value, value], dim=2)[:, :, : shape.K]
    expected = dense(query, key, value, prefix_k, prefix_v, None)
    torch.testing.assert_close(
        decode_attention(as_view, key, value, prefix_k, prefix_v, None), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"length": torch.tensor([3])}], ids=["softcap", "length"])
def test_nothing_in_sight_gives_nothing(options):
    """As the kernel gives, where the mask hides the prefix too."""
    shape = SHAPES[1]
    mask = torch.zeros(shape.P * shape.B, 1, 1, shape.T + shape.K, dtype=torch.bool)
    assert not decode_attention(*tensors(shape), mask, **options).any()


def test_rows_that_are_no_multiple_of_the_streams():
    query, key, value, *prefix = tensors(Shape(2, 3, 2, 1, 4, 4, 3, 6))
    with pytest.raises(ValueError, match=r"query \(P\*B, heads, 1, D\).*got \(5, 2, 1, 4\)"):
        decode_attention(query[:5], key[:5], value[:5], *prefix, None)


@pytest.mark.parametrize(("D", "Dv"), [(264, 8), (8, 264)])
def test_large_heads_are_named(D, Dv):
    inputs = tensors(Shape(1, 2, 1, 1, D, Dv, 3, 4), torch.float32)
    with pytest.raises(ValueError, match=f"heads of up to 256 numbers, got {D} and {Dv}"):
        decode_attention(*inputs, None, impl="fused")
