"""Gradients: they reach every new parameter, agree with finite differences, and survive checkpointing."""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import parscale

# Under checkpointing the same operations run again on the same numbers; only sums may be taken in another order.
SAME = 2e-6


def new_tensors(model, name="default"):
    suffix = "" if name == "default" else f"@{name}"
    ends = (f"prefix_k{suffix}", f"prefix_v{suffix}")
    return {n: p for n, p in model.named_parameters() if n.endswith(ends) or f"aggregate_layer{suffix}." in n}


def gradients(model, ids, **arguments):
    model.zero_grad()
    model(input_ids=ids, labels=ids, **arguments).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(actual, expected, zoo, tolerance=SAME):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        zoo.close(actual[name], gradient, tolerance * max(1.0, gradient.abs().max().item()))


def test_gradients_reach_every_new_parameter(case, zoo):
    model, ids = case.wrapped(), zoo.token_ids()
    found = gradients(model, ids)
    assert found.keys() >= new_tensors(model).keys()
    assert len(new_tensors(model)) >= 6
    for name, tensor in new_tensors(model).items():
        gradient = found[name]
        assert gradient.shape == tensor.shape
        if "prefix" in name:  # every stream, head, and prefix token
            assert (gradient.abs().amax(-1) > 0).all(), name
        elif name.endswith("weight"):
            assert (gradient.abs().amax(-1) > 1e-9).all(), name


@pytest.mark.parametrize("case", ["llama-eager"], indirect=True)
def test_gradients_leave_the_start(case, zoo):
    """Right after `"random"`, with an aggregator whose last layer is zero, everything but its first layer moves."""
    model = parscale.wrap(case.plain(), zoo.P, prefix_length=zoo.T, init="random", seed=0)
    found = gradients(model, zoo.token_ids())
    still = {name for name in new_tensors(model) if not found[name].any()}
    assert {name.split("aggregate_layer.")[-1] for name in still} == {"0.weight", "0.bias"}


def test_finite_differences(case, zoo):
    """Directional derivatives in float64 against central differences of fourth order.

    RMS norms inside the backbones, and `eager`'s softmax, run in float32 even in a float64 model. What passes through
    them, as the prefixes do and the aggregator does not, has noise of about 1e-7 in the loss, so of 1e-7 / h in the
    quotient: at a step of h = 4e-3 that is 2.5e-5; measured: 5e-5 at most. Without such norms, and for the aggregator,
    what is left is the curvature; measured: 2e-6 at most (4e-6 at OPT's ReLU). Derivatives are of size 0.1 to 1, and
    directions of length 1. All experts are chosen, since a loss jumps where another one is.
    """
    exact = case.attention == "sdpa" and case.family.name in ("GPTNeoX", "GPT2", "OPT")
    model, ids, step = case.wrapped(dtype=torch.float64, **case.family.all_experts), zoo.token_ids(), 4e-3

    def loss():
        logits = model(input_ids=ids).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    groups = {}
    for name, tensor in new_tensors(model).items():
        groups.setdefault(name.rsplit(".", 1)[1] if "prefix" in name else name, []).append(tensor)
    for name, group in groups.items():
        # along the gradient, where there is most to see, and as much beside it
        noise = [torch.randn(tensor.shape, generator=generator).to(tensor) for tensor in group]
        lengths = [torch.cat([x.flatten() for x in xs]).norm() for xs in ([t.grad for t in group], noise)]
        along = [(t.grad / lengths[0] + n / lengths[1]) / 2**0.5 for t, n in zip(group, noise, strict=True)]
        start = [tensor.detach().clone() for tensor in group]
        quotient = 0.0
        for steps, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
            with torch.no_grad():
                for tensor, at, direction in zip(group, start, along, strict=True):
                    tensor.copy_(at + steps * step * direction)
                quotient += weight * loss().item() / (12 * step)
        with torch.no_grad():
            for tensor, at in zip(group, start, strict=True):
                tensor.copy_(at)
        expected = sum((tensor.grad * d).sum().item() for tensor, d in zip(group, along, strict=True))
        assert abs(expected) > 2e-4, name
        tolerance = 1e-5 if exact or "aggregate_layer" in name else 1e-4
        assert abs(quotient - expected) <= tolerance, (name, quotient, expected)


REENTRANT = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])


def checkpointed(model, reentrant):
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # newer name first
    enable({"use_reentrant": reentrant})
    return model.train()


@pytest.mark.grid
@REENTRANT
def test_checkpointing_changes_no_gradient(family, zoo, reentrant):
    ids = zoo.token_ids()
    expected = gradients(family.wrapped().train(), ids, use_cache=False)
    model = checkpointed(family.wrapped(), reentrant)
    assert_same(gradients(model, ids, use_cache=False), expected, zoo)
    # what the backward pass computes again is what the loss was computed from
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, family.wrapped()(input_ids=ids).logits)
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    assert_same(gradients(model, ids, use_cache=False), expected, zoo)


@pytest.mark.grid
@REENTRANT
def test_checkpointing_with_a_frozen_backbone(family, zoo, reentrant):
    """A reentrant checkpoint gives nothing back when nothing that goes in needs a gradient."""
    ids, plain = zoo.token_ids(), family.wrapped().train()
    plain.freeze_backbone()
    expected = gradients(plain, ids, use_cache=False)
    model = checkpointed(family.wrapped(), reentrant)
    model.freeze_backbone()
    found = gradients(model, ids, use_cache=False)
    assert found.keys() == new_tensors(model).keys()
    assert_same(found, expected, zoo)


@REENTRANT
@pytest.mark.parametrize(("transform", "trains"), [("prefix", True), ("prefix", False), ("lora", True)])
def test_checkpointing_around_the_layers_in_the_thread_of_a_gpu(zoo, transform, trains, reentrant):
    """FSDP's `activation_checkpointing` puts modules around the layers; on a GPU another thread computes them again.

    They do it in eval mode too.
    """
    ids, family = zoo.token_ids(), zoo.FAMILIES["llama"]
    plain, model = (parscale.wrap(family.build(), 2, transform=transform, seed=0).train(trains) for _ in range(2))
    plain.freeze_backbone()
    expected = gradients(plain, ids, use_cache=False)
    model.freeze_backbone()
    apply_activation_checkpointing(
        model,
        functools.partial(
            checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
        ),
        lambda module: isinstance(module, LlamaDecoderLayer),
    )
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    with ThreadPoolExecutor() as gpu:
        gpu.submit(loss.backward).result()
    found = {name.replace("_checkpoint_wrapped_module.", ""): p.grad for name, p in model.named_parameters()}
    assert_same({name: gradient for name, gradient in found.items() if gradient is not None}, expected, zoo)
    parscale.unwrap(model)
    wrapper = model.model.layers[0]
    assert wrapper.checkpoint_fn.func is torch.utils.checkpoint.checkpoint  # its own again


@pytest.mark.grid
@REENTRANT
def test_checkpointing_without_streams(family, zoo, reentrant):
    ids = zoo.token_ids()
    expected = gradients(checkpointed(family.plain(), reentrant), ids, use_cache=False)
    model = checkpointed(family.wrapped(), reentrant)
    gradients(model, ids)
    model.set_streams(None)
    found = gradients(model, ids, use_cache=False)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert found.keys() == expected.keys()
    parscale.unwrap(model)
    found = gradients(model, ids, use_cache=False)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.grid
@pytest.mark.parametrize("reentrant", [True, False, None], ids=["reentrant", "not reentrant", "no checkpointing"])
@pytest.mark.parametrize("switch", ["set_streams", "use_streams"])
def test_switching_between_forward_and_backward(family, zoo, reentrant, switch):
    """Two forward passes with different sets, then both backward passes: each with the set of its forward pass."""
    ids, more = zoo.token_ids(), zoo.token_ids(seed=9)

    def build():
        model = family.wrapped().train()
        model.add_streams("two", 2, prefix_length=6, init="random")
        zoo.fill_streams(model, seed=3, name="two")
        return model

    model, expected = build(), {}
    for name, text in (("default", ids), ("two", more)):
        model.set_streams(name)
        for parameter, gradient in gradients(model, text, use_cache=False).items():
            expected[parameter] = expected.get(parameter, 0) + gradient

    model = build()
    if reentrant is not None:
        checkpointed(model, reentrant)
    losses = []
    for name, text in (("default", ids), ("two", more)):
        if switch == "set_streams":
            model.set_streams(name)
            losses.append(model(input_ids=text, labels=text, use_cache=False).loss)
        else:
            with model.use_streams(name):
                losses.append(model(input_ids=text, labels=text, use_cache=False).loss)
    model.set_streams(None)
    for loss in losses:
        loss.backward()
    assert_same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected, zoo)
    assert not any(tensor.requires_grad for name in ("default", "two") for tensor in new_tensors(model, name).values())


@pytest.mark.parametrize("reentrant", [True, False, None], ids=["reentrant", "not reentrant", "no checkpointing"])
@pytest.mark.parametrize("name", ["default", None])
@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_hook_that_asks_for_the_streams_sees_those_of_the_forward_pass(family, zoo, name, reentrant):
    """The backward pass runs after the block, where the other set is active."""
    ids, model, seen = zoo.token_ids(), family.wrapped().train(), []
    model.set_streams(None if name else "default")
    if reentrant is not None:
        checkpointed(model, reentrant)
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *args: seen.append(model.num_streams))
    with model.use_streams(name):
        P = model.num_streams
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert seen == [P] * (1 if reentrant is None else 2)
    assert model.num_streams != P


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_frozen_set_stays_without_gradients(family, zoo):
    model, ids = family.wrapped().train(), zoo.token_ids()
    model.add_streams("two", 2, prefix_length=6, init="random")
    for name, other in (("two", "default"), ("default", "two"), ("two", "default")):
        model.set_streams(name)
        found = gradients(model, ids)
        assert not found.keys() & new_tensors(model, other).keys()
        assert found.keys() >= new_tensors(model, name).keys()


def test_embeddings_in_place_of_ids_pass_the_gradient_on(family, zoo):
    model, ids = family.wrapped(), zoo.token_ids()
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=ids).loss.backward()
    assert embeddings.grad.shape == embeddings.shape
    assert (embeddings.grad.abs().amax(-1)[:, :-1] > 0).all()


@pytest.mark.parametrize("case", ["llama-eager", "llama-sdpa", "mistral-sdpa", "opt-sdpa"], indirect=True)
def test_the_two_implementations_agree(case, zoo):
    """`eager` and `sdpa` are different code, with and without a mask; their gradients are the same."""
    ids, mask = zoo.token_ids(), torch.ones(zoo.B, zoo.S, dtype=torch.long)
    mask[1, 6:] = 0
    reference = type(case)(case.family, "eager")
    for arguments in ({}, {"attention_mask": mask}):
        found = gradients(case.wrapped(), ids, **arguments)
        assert_same(found, gradients(reference.wrapped(), ids, **arguments), zoo, 1e-5)


def test_dropout_of_attention_reaches_the_prefix(zoo):
    """With every weight dropped nothing of prefix or tokens comes through; so dropout is applied to both."""
    for attention in ("eager", "sdpa"):
        model = zoo.Case(zoo.FAMILIES["llama"], attention).wrapped(attention_dropout=1.0 - 1e-7).train()
        outputs = []
        layer = model.model.layers[0].self_attn.o_proj
        layer.register_forward_pre_hook(lambda module, args, outputs=outputs: outputs.append(args[0]))
        model(input_ids=zoo.token_ids())
        assert not outputs[0].any()


def test_a_training_step_lowers_the_loss(family, zoo):
    model, ids = family.wrapped().train(), zoo.token_ids()
    model.freeze_backbone()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
