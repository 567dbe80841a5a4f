"""Which sets train while blocks are open, in other threads too, and what that does to gradients and to FSDP."""

import gc
import threading

import pytest
import torch


@pytest.fixture
def two(zoo):
    """Makes a model with a further set, the same at every call."""

    def make():
        model = zoo.Case(zoo.FAMILIES["llama"], "sdpa").wrapped()
        model.add_streams("two", 2, prefix_length=3, init="random")
        zoo.fill_streams(model, seed=3, name="two")
        return model

    return make


def tensors(model, name):
    return model.parscale.tensors(model.parscale.sets[name])


def trains(model, name):
    return [parameter.requires_grad for parameter in tensors(model, name).values()]


def test_a_pass_that_ran_before_a_switch_adds_to_the_gradients(two, zoo):
    def sums(switch):
        model, first, second = two(), zoo.token_ids(), zoo.token_ids(seed=9)
        model(first, labels=first, use_cache=False).loss.backward()
        loss = model(second, labels=second, use_cache=False).loss
        if switch:
            model.set_streams("two")
        loss.backward()
        return tensors(model, "default")

    for (name, found), expected in zip(sums(True).items(), sums(False).values(), strict=True):
        assert torch.equal(found.grad, expected.grad), name


def test_switching_to_and_fro_before_a_pass_changes_no_gradient(two, zoo):
    def gradients(switches):
        model, ids = two(), zoo.token_ids()
        for _ in range(switches):
            model.set_streams("two")
            model.set_streams("default")
        loss = model(ids, labels=ids, use_cache=False).loss
        model.set_streams("two")
        loss.backward()
        return {name: tensor.grad for name, tensor in tensors(model, "default").items()}

    expected = gradients(0)
    for name, found in gradients(2).items():
        assert torch.equal(found, expected[name]), name


def test_a_choice_while_another_thread_has_a_block_open_lasts(two, at_once):
    model, barrier = two(), threading.Barrier(2, timeout=60)

    def block():
        with model.use_streams(None):
            barrier.wait()
            barrier.wait()

    def choose():
        barrier.wait()
        model.set_streams("two")
        barrier.wait()

    at_once(block, choose)
    assert all(trains(model, "two"))
    assert not any(trains(model, "default"))


def test_what_is_frozen_in_a_block_stays_frozen_after_an_inner_one(two):
    model = two()
    with model.use_streams("two"):
        frozen, *others = tensors(model, "two").values()
        frozen.requires_grad_(False)
        with model.use_streams(None):
            pass
        assert not frozen.requires_grad
        assert all(parameter.requires_grad for parameter in others)


def test_a_set_that_is_chosen_anew_in_a_block_trains(two):
    """What was frozen there before the choice too, as outside of blocks."""
    model = two()
    with model.use_streams("default"):
        next(iter(tensors(model, "default").values())).requires_grad_(False)
        with model.use_streams("two"):
            pass
        model.set_streams("two")
        model.set_streams("default")
        assert all(trains(model, "default"))


def test_a_later_block_freezes_the_models_own_set_again(two, zoo, at_once):
    model, ids = two(), zoo.token_ids()
    with model.use_streams("two"):
        at_once(lambda: model(ids, labels=ids, use_cache=False).loss.backward())
        assert all(trains(model, "default"))
    gc.collect()  # the thread that trained is gone
    with model.use_streams("two"):
        assert not any(trains(model, "default"))


@pytest.mark.parametrize("choose", ["use_streams", "set_streams", "freeze_backbone"])
def test_what_fsdp_holds_gathered_is_sharded_before_it_is_frozen(choose, two):
    from torch.distributed.fsdp import FSDPModule

    model, seen = two(), []
    layer = model.model.layers[0]

    def reshard(self):
        seen.append((trains(model, "default")[0], trains(model, "two")[0]))

    layer.__class__ = type("Sharded", (FSDPModule, type(layer)), {"reshard": reshard})
    if choose == "use_streams":
        with model.use_streams("two"):
            pass
        assert seen == [(True, False), (False, True)]
    else:
        model.set_streams("two") if choose == "set_streams" else model.freeze_backbone()
        assert seen == [(True, False)]
