"""The module that mixes the streams, against its definition and the released order of its inputs."""

import copy

import pytest
import torch
from torch import nn

import parscale
from parscale.kernels import aggregate
from parscale.streams import aggregator
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
def test_the_aggregator_is_its_definition(smoothing):
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


def test_float32_above_bfloat16():
    """The layers and the weights are in float32; the mixture is rounded once, to the dtype of the hidden states."""
    module, hidden = filled(dtype=torch.float32), draw(P * B, S, H, seed=9, dtype=torch.bfloat16)
    expected = by_hand(module, hidden, 0.1)
    mixed = module(hidden)
    assert mixed.dtype == torch.bfloat16
    assert ((mixed.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-5).all()
    exact = copy.deepcopy(module).double().weights(hidden.double())
    assert (module.weights(hidden).double() - exact).abs().max() < 1e-5


@pytest.mark.parametrize(
    "options",
    [{}, {"kv": "shared"}, {"transform": "lora"}, {"transform": "prompt"}],
    ids=["own", "shared", "lora", "prompt"],
)
def test_streams_in_float32_above_a_bfloat16_backbone(options, zoo):
    """As with the whole model in float32, up to what the backbone rounds: logits, text and gradients."""
    backbone, ids = zoo.FAMILIES["llama"].build("sdpa", dtype=torch.bfloat16), zoo.token_ids()
    streams = {"prefix_length": 4, "init": "random", "seed": 0} | options
    exact = parscale.wrap(copy.deepcopy(backbone).float(), P, **streams)
    model = parscale.wrap(backbone, P, **streams)
    own, same = (dict(each.named_parameters()) for each in (model, exact))
    for each in (model, exact):
        each.freeze_backbone()
    trained = [name for name, parameter in own.items() if parameter.requires_grad]
    for seed, name in enumerate(trained):
        values = draw(*own[name].shape, seed=seed, dtype=torch.float32) * (0.5 * own[name].shape[-1] ** -0.5)
        own[name].data, same[name].data = values, values.clone()
    labels = {"input_ids": ids, "labels": ids}
    found, expected = model(**labels), exact(**labels)
    assert found.logits.dtype == torch.bfloat16
    zoo.close(found.logits, expected.logits, 0.1)
    found.loss.backward()
    expected.loss.backward()
    assert trained
    for name in trained:
        gradient, other = own[name].grad, same[name].grad
        assert gradient.dtype == torch.float32
        assert other.norm() > 0
        assert (gradient - other).norm() < 0.2 * other.norm(), name
    with torch.no_grad():
        text = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        logits = exact(text).logits[:, ids.shape[1] - 1 : -1]
        chosen = logits.gather(-1, text[:, ids.shape[1] :, None])[..., 0]
    assert (logits.amax(-1) - chosen).max() < 0.2


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


def test_the_aggregator_starts_with_equal_weights():
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


def test_hooks_on_its_layers_run(monkeypatch):
    """Also where the kernel would compute the layers and the mixture at once."""
    module, hidden = Aggregator(P, H, 0.0, dtype=torch.float64, device=torch.device("cpu")), draw(P * B, S, H)
    monkeypatch.setattr(aggregator, "aggregator", lambda *args, **options: pytest.fail("its layers were passed by"))
    monkeypatch.setattr(aggregator, "aggregate", lambda *args, impl: aggregate(*args))
    module[2].register_forward_hook(lambda layer, args, output: output + torch.tensor([0.0, 1e4, 0.0]))
    assert torch.equal(module(hidden, impl="fused"), hidden.unflatten(0, (P, B))[1])


def test_what_needs_the_tensors_of_a_replaced_aggregator_says_so(tiny, tmp_path):
    model = parscale.wrap(tiny(), 2, prefix_length=3, init="random")
    decoder, trained = model.get_decoder(), [parameter.requires_grad for parameter in model.parameters()]
    own, decoder.aggregate_layer = decoder.aggregate_layer, nn.Linear(2, 2)
    for ask in (
        model.freeze_backbone,
        model.print_trainable_parameters,
        lambda: model.stream_report(torch.ones(1, 4, dtype=torch.long)),
        lambda: model.save_pretrained(tmp_path / "full"),
        lambda: model.save_streams(tmp_path / "streams"),
    ):
        with pytest.raises(ValueError, match=r"model\.aggregate_layer is a Linear in place of .* a forward hook on it"):
            ask()
    assert list(tmp_path.iterdir()) == []
    decoder.aggregate_layer = own
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    model.save_streams(tmp_path / "streams")
