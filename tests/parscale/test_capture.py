"""Decoding steps and training steps, as a CUDA graph captures them: no operator waits for the device.

A graph records launches. A number that Python asks a tensor for (`int(length)`, `if mask.all()`) would have to wait for
launches that have not run, and ends the capture with an error.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

import parscale

WAITS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2"}


class Asked(TorchDispatchMode):
    """Notes the operators whose results Python, or the size of a result, depends on."""

    def __init__(self):
        super().__init__()
        self.names, self.found = set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names.add(name)
        indices = args[1] if name in ("index", "index_put_") else ()
        by_mask = any(x is not None and x.dtype == torch.bool for x in indices)  # whose size is asked for
        if name in WAITS or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kv", ["own", "shared"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_a_step_with_a_static_cache(name, kv, zoo):
    family = zoo.FAMILIES[name]
    model = zoo.Case(family, family.attention[-1]).plain()
    parscale.wrap(model, zoo.P, prefix_length=zoo.T, init="random", kv=kv)
    cache, ids = StaticCache(config=model.config, max_cache_len=16), zoo.token_ids()
    model(ids, past_key_values=cache, logits_to_keep=1)
    with Asked() as asked:
        model(ids[:, :1], past_key_values=cache)
    assert "index_copy_" in asked.names  # into the cache
    assert not asked.found


@pytest.mark.parametrize("kv", ["own", "shared"])
def test_a_training_step(kv, zoo):
    model = zoo.Case(zoo.FAMILIES["llama"], "sdpa").plain()
    parscale.wrap(model, zoo.P, prefix_length=zoo.T, init="random", kv=kv)
    model.train()
    with Asked() as asked:
        torch.autograd.grad(model(zoo.token_ids()).logits.sum(), model.get_input_embeddings().weight)
    assert "bmm" in asked.names
    assert not asked.found


def test_what_waits_is_noted():
    with Asked() as asked:
        int(torch.ones(()))
        torch.equal(torch.ones(2), torch.ones(2))
        torch.ones(2)[torch.ones(2, dtype=torch.bool)]
    assert asked.found == ["_local_scalar_dense", "equal", "index"]
