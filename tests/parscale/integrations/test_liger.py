"""Liger's fused loss, head and cross-entropy in one, on a model with streams: the loss and gradients of plain torch.

It takes the place of the model's `forward`, and reads the mixed states. Runs where liger-kernel is installed; its
Triton kernel is interpreted, since a CPU has no compiler for it.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("liger_kernel")

CODE = """
import json
import sys

import torch
from liger_kernel.transformers import _apply_liger_kernel_to_instance
from transformers import LlamaConfig, LlamaForCausalLM

import parscale

SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def made(kv):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS))
    parscale.wrap(model, 3, prefix_length=3, init="random", seed=0, kv=kv).train()
    with torch.no_grad():
        for tensor in model.parscale.tensors(model.parscale.active).values():
            tensor += 0.3 * torch.randn(tensor.shape)
    ids = torch.randint(99, (2, 15))
    labels = ids.clone()
    labels[0, :4] = -100
    return model, ids, labels


def differentiated(model, ids, labels):
    model.zero_grad()
    output = model(input_ids=ids, labels=labels)
    output.loss.backward()
    gradients = {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}
    return output, gradients


for kv in sys.argv[1:]:
    given = made(kv)
    plain, expected = differentiated(*given)
    _apply_liger_kernel_to_instance(model=given[0], rope=False, rms_norm=False, swiglu=False)
    fused, found = differentiated(*given)
    print(json.dumps({
        "logits": [plain.logits is not None, fused.logits is not None],
        "losses": [plain.loss.item(), fused.loss.item()],
        "same tensors": expected.keys() == found.keys(),
        "difference": max((found[name] - expected[name]).abs().max().item() for name in expected),
        "largest": max(gradient.abs().max().item() for gradient in expected.values()),
    }))
"""


@pytest.mark.slow
def test_fused_loss(tmp_path):
    """With own and with shared caches; one process for both, since its imports take longest."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # read when Triton is imported
    command = [sys.executable, "-P", "-c", CODE, "own", "shared"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    own, shared = map(json.loads, done.stdout.splitlines()[-2:])
    for found in (own, shared):
        assert found["logits"] == [True, False]
        assert found["losses"][1] == pytest.approx(found["losses"][0], rel=1e-6)  # float32's rounding
        assert found["same tensors"]
        assert found["difference"] < 1e-5 * found["largest"]  # likewise, summed over tokens
    assert own["losses"] != shared["losses"]
