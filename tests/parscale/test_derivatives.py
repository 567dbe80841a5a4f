"""Second derivatives, forward derivatives and the transforms of `torch.func`: what the plain backbone can, no less.

Everything is float64. RMS norms inside the backbone run in float32, which leaves an error of about 1e-6.
"""

import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import parscale

TRANSFORMS = ["prefix", "prompt", "lora"]


@pytest.fixture
def make(tiny):
    """A model in float64 with streams that differ; `None`: without streams."""

    def build(transform, attention="sdpa"):
        model = tiny(dtype=torch.float64)
        model.set_attn_implementation(attention)
        if transform is None:
            return model
        parscale.wrap(model, 3, prefix_length=4, init="random", transform=transform)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(part in name for part in ("prefix_", "prompt", "stream_", "aggregate_layer")):
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model

    return build


def of_embeddings(model, zoo):
    """A logit as a function of embeddings, and a place to differentiate it at."""
    with torch.no_grad():
        at = model.get_input_embeddings()(zoo.token_ids(rows=1, length=4))
    return (lambda x: model(inputs_embeds=x, use_cache=False).logits[0, -1, 5]), at


def hessian(function, at):
    return torch.autograd.functional.hessian(function, at).flatten()


def relative(found, truth):
    return ((found - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_second_derivatives(transform, make, zoo):
    """Right by torch's own formulas for attention; by flash attention an error, as of the plain backbone."""
    truth = hessian(*of_embeddings(make(transform, "eager"), zoo))
    model = make(transform)
    with sdpa_kernel(SDPBackend.MATH):
        assert relative(hessian(*of_embeddings(model, zoo)), truth) < 1e-5
    for each in (make(None), model):
        with pytest.raises(RuntimeError, match=r"derivative|differentiable once"):
            hessian(*of_embeddings(each, zoo))


def test_second_derivatives_in_the_prefix_say_how(make, zoo):
    model = make("prefix")
    prefix = model.model.layers[0].self_attn.prefix_k
    ids = zoo.token_ids()
    (first,) = torch.autograd.grad(model(ids, labels=ids).loss, prefix, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once.*SDPBackend\.MATH.*'eager'"):
        torch.autograd.grad(first.square().sum(), prefix)
    with sdpa_kernel(SDPBackend.MATH):
        (first,) = torch.autograd.grad(model(ids, labels=ids).loss, prefix, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), prefix)
    exact = make("prefix", "eager")
    prefix = exact.model.layers[0].self_attn.prefix_k
    (first,) = torch.autograd.grad(exact(ids, labels=ids).loss, prefix, create_graph=True)
    assert relative(second, torch.autograd.grad(first.square().sum(), prefix)[0]) < 1e-5


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_forward_derivatives(transform, make, zoo):
    """Those of the backward pass; by flash attention an error."""
    model = make(transform)
    function, at = of_embeddings(model, zoo)
    direction = torch.randn(at.shape, generator=torch.Generator().manual_seed(2), dtype=at.dtype)
    expected = (torch.autograd.functional.jacobian(function, at) * direction).sum()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        function(forward_ad.make_dual(at, direction))
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(at, direction))).tangent
    zoo.close(tangent, expected, 1e-5)


# -- torch.func


def loss_of(model):
    """As a function of the parameters and of ids."""
    return lambda parameters, ids: (
        functional_call(model, parameters, (), {"input_ids": ids, "labels": ids, "use_cache": False}).loss
    )


def by_backward(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.grid
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradients_by_a_transform(transform, attention, make, zoo):
    """Of a whole batch, and of each of its rows."""
    model, ids = make(transform, attention), zoo.token_ids()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = grad(loss_of(model))(parameters, ids)
    for name, gradient in by_backward(model, ids).items():
        zoo.close(found[name], gradient, 1e-12)
    one = loss_of(model)
    found = vmap(grad(lambda parameters, row: one(parameters, row[None])), in_dims=(None, 0))(parameters, ids)
    for row in range(zoo.B):
        for name, gradient in by_backward(model, ids[row : row + 1]).items():
            zoo.close(found[name][row], gradient, 1e-12)


@pytest.mark.grid
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_rows_and_models_by_a_transform(transform, attention, make, zoo):
    model, ids = make(transform, attention), zoo.token_ids()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
        expected = [each(ids).logits for each in (model, other)]
        zoo.close(vmap(lambda row: model(row[None], use_cache=False).logits[0])(ids), expected[0], 1e-12)
        one_token = vmap(lambda row: model(row[None], use_cache=False).logits[0])(ids[:, :1])
        zoo.close(one_token, model(ids[:, :1]).logits, 1e-12)
        both, buffers = stack_module_state([model, other])
        shell = copy.deepcopy(model).to("meta")
        run = vmap(lambda p, b: functional_call(shell, (p, b), (ids,), {"use_cache": False}).logits)
        for found, logits in zip(run(both, buffers), expected, strict=True):
            zoo.close(found, logits, 1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_jacobians_by_a_transform(transform, make, zoo):
    model = make(transform)
    with torch.no_grad():
        at = model.get_input_embeddings()(zoo.token_ids(rows=1, length=4))

    def function(x):
        return model(inputs_embeds=x, use_cache=False).logits[0, -1, :4]

    zoo.close(jacrev(function)(at), torch.autograd.functional.jacobian(function, at), 1e-12)
    with sdpa_kernel(SDPBackend.MATH):
        found = jacrev(jacrev(lambda x: function(x)[0]))(at)
    truth = hessian(lambda x: make(transform, "eager")(inputs_embeds=x, use_cache=False).logits[0, -1, 0], at)
    assert relative(found.flatten(), truth) < 1e-5
