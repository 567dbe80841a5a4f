"""The torch references, against the definitions written out token by token in float64."""

import math

import pytest
import torch

from parscale.kernels import aggregate, aggregator, causal_attention, causal_attention_reference
from parscale.kernels.aggregate import stream_weights
from parscale.kernels.aggregate.reference import aggregate_reference

# float32 rounding: 6e-8 per operation; sums of up to 16 terms of size 1 to 4.
FLOAT32 = 2e-6


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_hand(x, logits, smoothing):
    P, N, H = x.shape
    mixed = torch.zeros(N, H, dtype=torch.float64)
    for n in range(N):
        row = [logits[n, p].item() for p in range(P)]
        exponentials = [math.exp(value - max(row)) for value in row]
        for p in range(P):
            weight = exponentials[p] / sum(exponentials) * (1 - smoothing) + smoothing / P
            mixed[n] += weight * x[p, n].double()
    return mixed


@pytest.mark.parametrize("P", [1, 2, 3, 8])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_aggregate_is_its_definition(P, smoothing, dtype):
    x, logits = draw(P, 7, 5, dtype=dtype), 3 * draw(7, P, dtype=dtype, seed=1)
    mixed = aggregate_reference(x, logits, smoothing)
    assert mixed.dtype == dtype
    expected = by_hand(x, logits, smoothing)
    # half a unit in the last place of the output, whose size is below 4, beside float32 inside
    tolerance = {torch.float64: 1e-14, torch.float32: FLOAT32}.get(dtype, 2 * torch.finfo(dtype).eps)
    assert (mixed.double() - expected).abs().max() <= tolerance
    assert torch.equal(aggregate(x, logits, smoothing, impl="reference"), mixed)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_weights_are_a_distribution_with_a_floor(smoothing):
    weights = stream_weights(30 * draw(50, 4, dtype=torch.float32), smoothing)
    assert weights.dtype == torch.float32
    assert (weights.sum(-1) - 1).abs().max() < 1e-6
    assert weights.min() >= smoothing / 4
    assert weights.max() <= 1 - smoothing * 3 / 4 + 1e-6


def test_weights_of_extreme_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e38, -1e38, -1e38], [88.0, 89.0, 90.0]])
    weights = stream_weights(logits, 0.0)
    assert weights.isfinite().all()
    assert weights[0].tolist() == [1.0, 0.0, 0.0]
    assert (weights[1] - 1 / 3).abs().max() < 1e-6
    assert stream_weights(logits.half().clamp(-6e4, 6e4), 0.0).dtype == torch.float32


@pytest.mark.parametrize("P", [1, 2, 5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_gradients_of_aggregate_in_float64(P, smoothing):
    x, logits = draw(P, 3, 4).requires_grad_(), draw(3, P, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(aggregate_reference, (x, logits, smoothing))
    assert torch.autograd.gradgradcheck(aggregate_reference, (x, logits, smoothing))


def attention_by_hand(query, key, value, prefix_k, prefix_v, scaling):
    rows, heads, S, _ = query.shape
    G, B = prefix_k.shape[1], rows // prefix_k.shape[0]
    output = torch.zeros(rows, heads, S, value.shape[-1], dtype=torch.float64)
    for row in range(rows):
        for head in range(heads):
            group, stream = head // (heads // G), row // B
            for token in range(S):
                keys = torch.cat([prefix_k[stream, group], key[row, group, : token + 1]]).double()
                values = torch.cat([prefix_v[stream, group], value[row, group, : token + 1]]).double()
                scores = keys @ query[row, head, token].double() * scaling
                output[row, head, token] = torch.softmax(scores, 0) @ values
    return output


def attention_inputs(dtype=torch.float64, P=2, B=2, heads=4, G=2, S=5, T=3, D=8):
    return [
        draw(*shape, dtype=dtype, seed=seed)
        for seed, shape in enumerate([(P * B, heads, S, D), *[(P * B, G, S, D)] * 2, *[(P, G, T, D)] * 2])
    ]


@pytest.mark.parametrize("scaling", [None, 0.2])
@pytest.mark.parametrize("size", [{}, {"heads": 2}, {"G": 1}, {"S": 1}, {"T": 1}, {"B": 1}, {"P": 1}], ids=str)
@pytest.mark.parametrize("function", [causal_attention, causal_attention_reference])
def test_causal_attention_is_its_definition(function, size, scaling):
    inputs = attention_inputs(**size)
    expected = attention_by_hand(*inputs, scaling or 8**-0.5)
    assert (function(*inputs, scaling=scaling) - expected).abs().max() < 1e-12
    single = function(*(x.float() for x in inputs), scaling=scaling)
    assert (single.double() - expected).abs().max() < FLOAT32


@pytest.mark.parametrize("function", [causal_attention, causal_attention_reference])
def test_gradients_of_causal_attention_in_float64(function):
    inputs = [x.requires_grad_() for x in attention_inputs(B=1, heads=2, G=1, S=3, T=2, D=4)]
    assert torch.autograd.gradcheck(function, inputs)


def test_tensors_without_data_have_shapes():
    P, B, S, H = 3, 2, 5, 8
    sizes = ((P * B, S, H), (H, H * P), (H,), (P, H), (P,))
    assert aggregator(*(torch.empty(*size, device="meta") for size in sizes), 0.1).shape == (B, S, H)
    assert aggregate(torch.empty(P, S, H, device="meta"), torch.empty(S, P, device="meta"), 0.1).shape == (S, H)
