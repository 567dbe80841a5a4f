"""Llamas with random weights, the same at every call."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny_llama(seed=0, **changes):
    """For folders: few bytes."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**TINY | changes)).eval()


def small_llama(**changes):
    """For losses: with an `initializer_range` of 0.5 they differ between tokens."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL | changes)).eval()
