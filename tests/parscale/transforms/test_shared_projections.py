"""Keys and values of streams that share them are projected for stream 0 alone, where nobody reads the other rows."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

TOLERANCE = 1e-6
NARROWED = ["llama", "gemma3", "mixtral", "deepseek_v3", "gpt_oss", "opt"]
FUSED = ["gpt2", "phi3", "gpt_neox"]  # queries come out of the same layer


def shared(zoo, name):
    family = zoo.FAMILIES[name]
    return zoo.share(zoo.Case(family, family.attention[-1]).plain())


def operations(model, ids, **arguments):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = model(ids, **arguments).logits
    return counter.get_total_flops(), logits


def widen(model):
    """Projects all rows, as a layer does by itself."""
    hooks = model.parscale.active.transform._shared
    hooks.detach()
    hooks.attach({})


@pytest.mark.parametrize("name", NARROWED)
def test_nothing_but_the_arithmetic_changes(name, zoo):
    model, ids = shared(zoo, name), zoo.token_ids()
    narrow = [operations(model, ids, **given) for given in ({}, {"logits_to_keep": 2})]
    widen(model)
    for (fewer, found), given in zip(narrow, ({}, {"logits_to_keep": 2}), strict=True):
        more, expected = operations(model, ids, **given)
        zoo.close(found, expected, TOLERANCE)
        assert fewer < more


def test_the_arithmetic_by_hand(zoo):
    """Two layers of two projections of 32 x 16, for P - 1 streams; a step of one token is left as it is."""
    model, ids = shared(zoo, "llama"), zoo.token_ids()
    narrow = [operations(model, ids, **given)[0] for given in ({}, {"logits_to_keep": 1})]
    widen(model)
    wide = [operations(model, ids, **given)[0] for given in ({}, {"logits_to_keep": 1})]
    each = 2 * 2 * 2 * 32 * 16 * zoo.B
    assert wide[0] - narrow[0] == each * (zoo.P - 1) * zoo.S
    assert wide[1] == narrow[1]  # it reads the weights whatever the number of rows


@pytest.mark.parametrize("name", FUSED)
def test_a_layer_that_makes_queries_too_is_left_alone(name, zoo):
    model, ids = shared(zoo, name), zoo.token_ids()
    before = operations(model, ids)[0]
    widen(model)
    assert operations(model, ids)[0] == before


def test_gradients_are_those_of_projections_for_all_rows(zoo):
    models = [shared(zoo, "llama").double() for _ in range(2)]
    widen(models[1])
    for model in models:
        model(zoo.token_ids(), labels=zoo.token_ids()).loss.backward()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-12), name


def test_keys_that_something_else_reads_are_projected_for_all_rows(zoo):
    """A layer that adds its values to what it returns."""
    model = zoo.Case(zoo.FAMILIES["llama"], "sdpa").plain()
    layer = model.model.layers[1].self_attn
    values = []
    layer.v_proj.register_forward_hook(lambda module, args, output: values.append(output))
    layer.register_forward_hook(lambda module, args, output: (output[0] + values[-1].repeat(1, 1, 2), *output[1:]))
    zoo.share(model)
    assert not model.parscale.key_projections
    ids = zoo.token_ids()
    before = operations(model, ids)[0]
    widen(model)
    assert operations(model, ids)[0] == before


def test_copies_have_hooks_of_their_own(zoo):
    model, ids = shared(zoo, "llama"), zoo.token_ids()
    other = copy.deepcopy(model)
    fewer, expected = operations(model, ids)
    widen(model)
    assert operations(other, ids)[0] == fewer
    assert torch.equal(operations(other, ids)[1], expected)
    assert operations(model, ids)[0] > fewer


def test_after_unwrapping_nothing_is_left(zoo):
    from parscale import unwrap

    model, ids = shared(zoo, "llama"), zoo.token_ids()
    plain = zoo.Case(zoo.FAMILIES["llama"], "sdpa").plain()
    assert torch.equal(operations(unwrap(model), ids)[1], operations(plain, ids)[1])
