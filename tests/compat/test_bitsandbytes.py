"""Layers of 4 bits have gradients on a CPU."""

import pytest
import torch

from parscale.compat.bitsandbytes import four_bits_unpacked, four_bits_with_gradients
from parscale.errors import IncompatibleVersionError

bitsandbytes = pytest.importorskip("bitsandbytes")
modules = bitsandbytes.nn.modules


def layer():
    made = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    return made.to("cpu")


def gradient(made):
    """After a run in eval mode, which is when weights are packed."""
    made.eval()
    with torch.no_grad():
        made(torch.ones(1, 64))
    x = torch.ones(1, 64, requires_grad=True)
    made.train()(x).sum().backward()
    return x.grad


def test_a_layer_made_in_the_block_has_gradients():
    with four_bits_with_gradients():
        made = layer()
    found = gradient(made)
    weight = bitsandbytes.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)
    torch.testing.assert_close(found, weight.float().sum(0, keepdim=True), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not hasattr(modules, "has_avx512bf16"), reason="this version packs no weights")
def test_the_library_is_as_before_after_the_block():
    own = modules.has_avx512bf16
    with four_bits_with_gradients():
        assert not modules.has_avx512bf16()
    assert modules.has_avx512bf16 is own


@pytest.mark.skipif(not hasattr(modules, "has_avx512bf16"), reason="this version packs no weights")
def test_a_version_that_packs_in_another_way_is_refused(monkeypatch):
    monkeypatch.delattr(modules, "has_avx512bf16")
    with (
        pytest.raises(IncompatibleVersionError, match="has_avx512bf16, which the installed bitsandbytes"),
        four_bits_with_gradients(),
    ):
        pass


def test_a_version_that_packs_nothing_is_left_as_it_is(monkeypatch):
    for name in ("has_avx512bf16", "_convert_weight_packed_for_cpu"):
        monkeypatch.delattr(modules, name, raising=False)
    with four_bits_with_gradients():
        assert not hasattr(modules, "has_avx512bf16")


def test_layers_of_a_model_have_gradients_after_the_block():
    made = layer()
    model, packs = torch.nn.Sequential(made).eval(), vars(made).get("support_avx512bf16_for_cpu")
    with four_bits_unpacked(model), torch.no_grad():
        model(torch.ones(1, 64))
    assert vars(made).get("support_avx512bf16_for_cpu") == packs
    x = torch.ones(1, 64, requires_grad=True)
    model.train()(x).sum().backward()
    assert x.grad.any()


@pytest.mark.skipif(not hasattr(modules, "has_avx512bf16"), reason="this version packs no weights")
def test_a_layer_says_whether_it_will_pack_its_weights(monkeypatch):
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    assert layer().support_avx512bf16_for_cpu
