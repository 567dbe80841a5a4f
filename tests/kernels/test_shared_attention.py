"""Attention over shared keys, held against loops in float64 that know nothing of layouts."""

import pytest
import torch
from scripts import load_script
from torch.nn.attention import SDPBackend, sdpa_kernel

from parscale.kernels import decode_attention, pieces, shared_causal_attention, shared_decode_attention
from parscale.kernels.shared_causal_attention import shared_attention_reference

square_attention = load_script("gpu_bench").square_attention
T, D = 5, 8
BIAS = 5.0  # of keys, as Qwen2's have: scores are large and nearly alike
# streams, rows, heads, key/value heads, tokens
SHAPES = [(2, 1, 4, 2, 1), (3, 2, 6, 2, 7), (5, 3, 3, 3, 13), (2, 4, 8, 1, 33)]


def tensors(P, B, heads, G, S, K, dtype=torch.float64, has_plain=True, Dv=D):
    generator = torch.Generator().manual_seed(P * 100 + S)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    query = draw((P if has_plain else P - 1) * B, heads, S, D)
    key, value, prefix_k, prefix_v = draw(B, G, K, D), draw(B, G, K, Dv), draw(P - 1, G, T, D), draw(P - 1, G, T, Dv)
    with torch.no_grad():
        bias = BIAS * draw(1, G, 1, D)
        key += bias
        prefix_k += bias
    return query, key, value, prefix_k, prefix_v


def by_loops(query, key, value, prefix_k, prefix_v, visible, scaling=D**-0.5):
    """One query of one head at a time; `visible(b, s, k)` says whether row b's query s sees key k."""
    query, key, value, prefix_k, prefix_v = (x.double() for x in (query, key, value, prefix_k, prefix_v))
    R, heads, S, _ = query.shape
    B, G, K, _ = key.shape
    first = 1 - (R // B - prefix_k.shape[0])  # the stream of the first rows: 0, or 1 where stream 0 is left out
    rows = []
    for r in range(R):
        p, b = first + r // B, r % B
        for h in range(heads):
            g = h // (heads // G)
            for s in range(S):
                seen = [k for k in range(K) if visible(b, s, k)]
                keys, values = key[b, g, seen], value[b, g, seen]
                if p > 0:
                    keys = torch.cat([prefix_k[p - 1, g], keys])
                    values = torch.cat([prefix_v[p - 1, g], values])
                rows.append(((keys @ query[r, h, s]) * scaling).softmax(0) @ values)
    return torch.stack(rows).view(R, heads, S, -1)


@pytest.mark.parametrize("has_plain", [True, False], ids=["all streams", "without stream 0"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_causal(shape, has_plain):
    inputs = tensors(*shape, shape[-1], has_plain=has_plain)
    expected = by_loops(*inputs, lambda b, s, k: k <= s)
    found = shared_causal_attention(*inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert found.transpose(1, 2).is_contiguous()  # backbones view it as (R, S, heads * D)
    torch.testing.assert_close(shared_attention_reference(*inputs), expected, rtol=0, atol=1e-12)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    truth = torch.autograd.grad((expected * weights).sum(), inputs)
    for gradient, true in zip(gradients, truth, strict=True):
        torch.testing.assert_close(gradient, true, rtol=0, atol=1e-11)


@pytest.mark.parametrize("has_plain", [True, False], ids=["all streams", "without stream 0"])
def test_causal_by_the_operators_of_a_gpu(has_plain, operators):
    """Two calls each way: over the keys of stream 0, and of each stream over its prefix."""
    P, B, heads, G, S = 3, 2, 6, 2, 7
    inputs = tensors(P, B, heads, G, S, S, has_plain=has_plain)
    expected = shared_causal_attention(*inputs)
    found = operators.elsewhere(shared_causal_attention)(*inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    for gradient, true in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, true, rtol=0, atol=1e-11)
    keys = ((B, (P if has_plain else P - 1) * heads, S, D), (B, G, S, D), 0.0, True)
    prefixes = ((P - 1, heads, B * S, D), (P - 1, G, T, D), 0.0, False)
    assert operators.calls == [(way, *call) for way in ("forward", "backward") for call in (keys, prefixes)]


@pytest.mark.parametrize("has_plain", [True, False], ids=["all streams", "without stream 0"])
def test_causal_on_rocm_merges_nothing(has_plain, operators, monkeypatch):
    """Streams 1 to P - 1 over their prefix and copies of the keys, stream 0 over the keys: square masks, no merge."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    P, B, heads, G, S = 3, 2, 6, 2, 7
    inputs = tensors(P, B, heads, G, S, S, has_plain=has_plain)
    expected = by_loops(*inputs, lambda b, s, k: k <= s)
    found = operators.elsewhere(shared_causal_attention)(*inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert found.transpose(1, 2).is_contiguous()
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    for gradient, true in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, true, rtol=0, atol=1e-11)
    others = (((P - 1) * B, heads, T + S, D), ((P - 1) * B, G, T + S, D), 0.0, True)
    first = [((B, heads, S, D), (B, G, S, D), 0.0, True)] if has_plain else []
    calls = [others, *first]
    assert sorted(operators.calls) == sorted((way, *call) for way in ("forward", "backward") for call in calls)


def by_squares(query, key, value, prefix_k, prefix_v):
    """Stream 0 over the keys, the others over copies of them behind their prefix, by torch's flash attention."""
    B, streams = key.shape[0], prefix_k.shape[0]
    nothing = prefix_k[:1, :, :0], prefix_v[:1, :, :0]
    copies = (x.repeat(streams, 1, 1, 1) for x in (key, value))
    return torch.cat(
        [square_attention(query[:B], key, value, *nothing), square_attention(query[B:], *copies, prefix_k, prefix_v)]
    )


def test_the_baseline_is_the_same_attention():
    inputs = tensors(3, 2, 6, 2, 7, 7)
    torch.testing.assert_close(by_squares(*inputs), shared_attention_reference(*inputs), rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_causal_on_a_gpu(dtype):
    """Errors against float64, of the output and each gradient, beside those of torch's flash attention."""
    inputs, results = [x.detach() for x in tensors(4, 2, 8, 2, 300, 300, dtype)], []
    for function, device, to in (
        (shared_causal_attention, "cuda", dtype),
        (by_squares, "cuda", dtype),
        (shared_attention_reference, "cpu", torch.float64),
    ):
        own = [x.to(device, to).requires_grad_() for x in inputs]
        output = function(*own)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append([output, *torch.autograd.grad(output, own, weights.to(output))])
    for own, theirs, truth in zip(*results, strict=True):
        errors = [(x.double().cpu() - truth).abs().mean() for x in (own, theirs)]
        assert errors[0] <= 2 * errors[1], errors


def test_causal_gradients_by_finite_differences():
    inputs = tensors(3, 2, 4, 2, 3, 3)
    assert torch.autograd.gradcheck(lambda *x: shared_causal_attention(*x, scaling=0.3), inputs)


def test_causal_is_differentiable_once():
    inputs = tensors(2, 1, 2, 1, 3, 3)
    (first,) = torch.autograd.grad(shared_causal_attention(*inputs).sum(), inputs[3], create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once.*SDPBackend\.MATH"):
        torch.autograd.grad(first.square().sum(), inputs[3])


@pytest.mark.parametrize("has_plain", [True, False], ids=["all streams", "without stream 0"])
@pytest.mark.parametrize("kind", ["none", "boolean", "additive", "by head"])
@pytest.mark.parametrize("shape", [(2, 1, 4, 2), (3, 2, 6, 2), (5, 3, 3, 3)], ids=str)
def test_decode(shape, kind, has_plain):
    K, (_, B, heads, _) = 9, shape
    inputs = tensors(*shape, 1, K, has_plain=has_plain, Dv=6)
    seen = torch.rand(B, 1, 1, K, generator=torch.Generator().manual_seed(3)) < 0.6
    seen[..., -1] = True
    mask = {"none": None, "boolean": seen}.get(kind)
    if kind in ("additive", "by head"):
        mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    if kind == "by head":
        mask = mask.expand(-1, heads, -1, -1)
    expected = by_loops(*inputs, lambda b, s, k: mask is None or bool(seen[b, 0, 0, k]))
    found = shared_decode_attention(*inputs, mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    for gradient, true in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, true, rtol=0, atol=1e-11)


def test_gradients_of_a_step_without_a_mask():
    """With values of the size of keys, as torch's own attention takes them."""
    inputs = tensors(3, 2, 4, 2, 1, 9)
    found, truth = (
        torch.autograd.grad(output.square().sum(), inputs)
        for output in (shared_decode_attention(*inputs, None), shared_attention_reference(*inputs))
    )
    for gradient, true in zip(found, truth, strict=True):
        torch.testing.assert_close(gradient, true, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fewer_bits_cost_no_more_than_torchs_own_attention(dtype):
    """The error against float64 is at most twice that of torch's attention over joined keys in the same dtype."""
    with torch.no_grad():
        inputs = [x.detach() for x in tensors(4, 2, 4, 2, 1, 50, dtype)]
        truth = by_loops(*inputs, lambda b, s, k: True)
        with sdpa_kernel(SDPBackend.MATH):
            theirs = shared_attention_reference(*inputs).double() - truth
        ours = shared_decode_attention(*inputs, None).double() - truth
        assert ours.abs().max() <= 2 * theirs.abs().max()
        inputs = [x.detach() for x in tensors(4, 2, 4, 2, 20, 20, dtype)]
        truth = by_loops(*inputs, lambda b, s, k: k <= s)
        with sdpa_kernel(SDPBackend.MATH):
            theirs = shared_attention_reference(*inputs).double() - truth
        ours = shared_causal_attention(*inputs).double() - truth
        assert ours.abs().max() <= 2 * theirs.abs().max()


def test_autocast_does_not_round_a_step():
    inputs, mask = tensors(3, 2, 4, 2, 1, 50, torch.float32), torch.ones(2, 1, 1, 50, dtype=torch.bool)
    expected = shared_decode_attention(*inputs, mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(shared_decode_attention(*inputs, mask), expected)


def test_half_precision_is_raised_in_pieces(monkeypatch):
    inputs = [x.detach() for x in tensors(3, 2, 4, 2, 1, 50, torch.bfloat16)]
    whole = shared_decode_attention(*inputs, None)
    monkeypatch.setattr(pieces, "PIECE", 7 * 2 * 2 * D)
    torch.testing.assert_close(shared_decode_attention(*inputs, None), whole, rtol=0, atol=2**-7)


def test_more_than_one_token_is_refused():
    inputs = tensors(3, 2, 4, 2, 2, 5)
    with pytest.raises(ValueError, match=r"query \(P\*B, heads, 1, D\), key \(B, G, K, D\), .*got \(6, 4, 2, 8\)"):
        shared_decode_attention(*inputs, None)


def test_rows_that_do_not_fit_are_refused():
    query, *others = tensors(3, 2, 4, 2, 1, 5)
    for function, mask in ((shared_decode_attention, (None,)), (shared_causal_attention, ())):
        with pytest.raises(ValueError, match=r"queries of 2 or 3 streams of 2 rows .* got query \(5, 4, 1, 8\)"):
            function(query[:5], *others, *mask)


# -- the kernel, to which the streams are further queries of a key/value head


@pytest.mark.grid
@pytest.mark.kernel
@pytest.mark.parametrize("kind", [None, "boolean", "boolean, per head", "additive", "length"])
@pytest.mark.parametrize("has_plain", [True, False], ids=["all streams", "without stream 0"])
@pytest.mark.parametrize("size", [(2, 1, 4, 2), (3, 2, 6, 2), (5, 3, 3, 3), (8, 1, 16, 2)], ids=str)
def test_fused_decode(size, has_plain, kind, device, poisoned, assert_as_exact):
    P, B, heads, G = size
    K, options = 70, {}
    inputs = [x.detach().to(device) for x in tensors(P, B, heads, G, 1, K, torch.float32, has_plain, Dv=12)]
    mask = None
    if kind == "length":
        options = {"length": torch.tensor([K - 9 * b for b in range(B)], device=device)}
    elif kind is not None:
        shape = (B, heads if "per head" in kind else 1, 1, K)
        mask = (torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.6).to(device)
        mask = torch.zeros(shape, device=device).masked_fill(~mask, -torch.inf) if kind == "additive" else mask
    exact_mask = mask.double() if kind == "additive" else mask
    exact = shared_decode_attention(*(x.double() for x in inputs), exact_mask, impl="reference", **options)
    plain = shared_decode_attention(*inputs, mask, impl="reference", **options)
    found = shared_decode_attention(*inputs, mask, impl="fused", **options)
    assert_as_exact(found, plain, exact)
    if kind == "length":
        beyond = (torch.arange(K, device=device) >= options["length"][:, None])[:, None, :, None]  # (B, 1, K, 1)
        spoiled = [x.masked_fill(beyond, float("nan")) for x in inputs[1:3]]
        again = shared_decode_attention(inputs[0], *spoiled, *inputs[3:], None, impl="fused", **options)
        assert torch.equal(again, found)


@pytest.mark.kernel
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_fused_decode_in_parts(splits, device, poisoned, assert_as_exact):
    from parscale.kernels.decode_attention.fused import decode

    inputs = [x.detach().to(device) for x in tensors(4, 2, 6, 2, 1, 300, torch.float32)]
    exact = shared_decode_attention(*(x.double() for x in inputs), None, impl="reference")
    found = decode(*inputs, None, None, None, D**-0.5, None, splits=splits)
    assert_as_exact(found, shared_decode_attention(*inputs, None, impl="reference"), exact)


def test_a_length_hides_what_lies_beyond():
    inputs = [x.detach() for x in tensors(3, 2, 4, 2, 1, 9)]
    for mask in (None, torch.rand(2, 1, 1, 9) < 0.7, torch.randn(2, 1, 1, 9, dtype=torch.float64)):
        short = [inputs[0], *(x[:, :, :6] for x in inputs[1:3]), *inputs[3:]]
        expected = shared_decode_attention(*short, None if mask is None else mask[..., :6])
        for value in (0.0, float("nan"), float("inf")):
            for x in inputs[1:3]:
                x[:, :, 6:] = value
            found = shared_decode_attention(*inputs, mask, length=torch.tensor([6]))
            torch.testing.assert_close(found, expected)


def test_too_many_queries_for_the_kernel_are_named():
    inputs = [x.detach() for x in tensors(9, 1, 8, 1, 1, 4, torch.float32)]
    with pytest.raises(ValueError, match="up to 64 queries for each key/value head, of all streams"):
        shared_decode_attention(*inputs, None, impl="fused")
    own = [torch.zeros(2, heads, tokens, 8) for heads, tokens in ((65, 1), (1, 4), (1, 4), (1, 3), (1, 3))]
    with pytest.raises(ValueError, match="up to 64 queries for each key/value head"):
        decode_attention(*own, None, impl="fused")
