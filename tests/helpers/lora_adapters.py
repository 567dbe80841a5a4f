"""Low-rank adapters on a small model, always the same, and what moves them without training."""

import pytest
import torch

from parscale.streams.naming import part_of

peft = pytest.importorskip("peft")

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def is_stream(name):
    return part_of(name) is not None


def lora(**changes):
    return peft.LoraConfig(**LORA | changes)


def adapted(model, **changes):
    torch.manual_seed(0)
    return peft.get_peft_model(model, lora(**changes)).eval()


@torch.no_grad()
def train(model, by=0.1):
    """Moves what trains."""
    for tensor in model.parameters():
        if tensor.requires_grad:
            tensor += by
