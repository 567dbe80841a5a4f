"""The module that mixes the streams, against its definition and the released order of its inputs."""

import pytest
import torch
from torch import nn

from parscale.streams.aggregator import Aggregator

P, B, S, H = 3, 2, 4, 5


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def filled(smoothing=0.1, dtype=torch.float64, num_streams=P, hidden=H):
    module = Aggregator(num_streams, hidden, smoothing, dtype=dtype, device=torch.device("cpu"))
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed + 1))
    return module


def by_hand(module, hidden, smoothing):
    """Token by token; the input of the first layer at `h * P + p` is element h of stream p."""
    weights = {name: tensor.detach().double() for name, tensor in module.named_parameters()}
    rows, mixed = hidden.double().unflatten(0, (P, B)), torch.zeros(B, S, H, dtype=torch.float64)
    for b in range(B):
        for s in range(S):
            x = torch.zeros(P * H, dtype=torch.float64)
            for p in range(P):
                for h in range(H):
                    x[h * P + p] = rows[p, b, s, h]
            inner = weights["0.weight"] @ x + weights["0.bias"]
            logits = weights["2.weight"] @ (inner / (1 + torch.exp(-inner))) + weights["2.bias"]
            share = torch.exp(logits) / torch.exp(logits).sum() * (1 - smoothing) + smoothing / P
            mixed[b, s] = sum(share[p] * rows[p, b, s] for p in range(P))
    return mixed


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_it_is_its_definition(smoothing):
    module, hidden = filled(smoothing), draw(P * B, S, H, seed=9)
    mixed = module(hidden)
    assert mixed.shape == (B, S, H)
    assert (mixed - by_hand(module, hidden, smoothing)).abs().max() < 1e-13
    weights = module.weights(hidden)
    rows = hidden.unflatten(0, (P, B))
    assert weights.shape == (B, S, P)
    assert (torch.einsum("pbsh,bsp->bsh", rows, weights) - mixed).abs().max() < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype):
    """Softmax and sum run in float32; the layers and the result round to the model's dtype."""
    module, hidden = filled(dtype=dtype), draw(P * B, S, H, seed=9, dtype=dtype)
    mixed = module(hidden)
    assert mixed.dtype == dtype
    assert module.weights(hidden).dtype == torch.float32
    weights = module.weights(hidden).double()
    expected = torch.einsum("pbsh,bsp->bsh", hidden.double().unflatten(0, (P, B)), weights)
    assert (mixed.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps  # of numbers up to 4


def test_gradients_in_float64():
    module, hidden = filled(), draw(P * B, S, H, seed=9).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def run(hidden, *tensors):
        return torch.func.functional_call(module, dict(zip(names, tensors, strict=True)), hidden)

    assert torch.autograd.gradcheck(run, (hidden, *(p for p in module.parameters())))


def test_names_and_shapes_are_the_released_ones():
    module = filled()
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == {"0.weight": (H, P * H), "0.bias": (H,), "2.weight": (P, H), "2.bias": (P,)}
    assert sum(p.numel() for p in module.parameters()) == P * H * H + H + H * P + P


def test_nothing_in_it_is_what_tools_take_for_a_layer_of_the_backbone():
    assert not any(isinstance(module, nn.Linear) for module in filled().modules())


def test_it_starts_with_equal_weights():
    module = Aggregator(P, H, 0.0, dtype=torch.float32, device=torch.device("cpu"))
    hidden = draw(P * B, S, H, seed=9, dtype=torch.float32)
    assert (module(hidden) - hidden.unflatten(0, (P, B)).mean(0)).abs().max() < 1e-6


def test_more_of_the_batch_and_other_strides_change_nothing():
    module, hidden = filled(), draw(P * B, S, H, seed=9)
    strided = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    assert (module(strided) - module(hidden)).abs().max() < 1e-15
    one = module(hidden.unflatten(0, (P, B))[:, :1].flatten(0, 1))
    assert (one - module(hidden)[:1]).abs().max() < 1e-15
