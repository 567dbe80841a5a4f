"""Liger's fused loss, head and cross-entropy in one, on a model with streams: the loss and gradients of plain torch.

It takes the place of the model's `forward`, and reads the mixed states. Runs where liger-kernel is installed.
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import parscale

pytest.importorskip("liger_kernel")

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def differentiated(model, ids, labels):
    """The output, and the gradients by name."""
    model.zero_grad()
    output = model(input_ids=ids, labels=labels)
    output.loss.backward()
    return output, {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.kernel
@pytest.mark.parametrize("kv", ["own", "shared"])
def test_fused_loss(kv, device):
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))
    parscale.wrap(model, 3, prefix_length=3, init="random", seed=0, kv=kv).train()
    with torch.no_grad():
        for tensor in model.parscale.tensors(model.parscale.active).values():
            tensor += 0.3 * torch.randn(tensor.shape)
    model.to(device)
    ids = torch.randint(99, (2, 15), device=device)
    labels = ids.clone()
    labels[0, :4] = -100
    plain, expected = differentiated(model, ids, labels)
    _apply_liger_kernel_to_instance(model=model, rope=False, rms_norm=False, swiglu=False)
    fused, found = differentiated(model, ids, labels)
    assert plain.logits is not None
    assert fused.logits is None
    assert fused.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)  # float32's rounding
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    difference = max((found[name] - expected[name]).abs().max().item() for name in expected)
    assert difference < 1e-5 * largest  # likewise, summed over tokens
