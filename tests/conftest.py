"""A tokenizer of single bytes, and a tiny checkpoint with it, for all tests.

Imports stand inside: what this module imports, pytest's controlling process does too, and prints when all is over.
"""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """One token for each byte, and the end of text as number 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet | {"<end>": len(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="session")
def backbone(byte_tokenizer, tmp_path_factory) -> Path:
    """A Llama of two layers in bfloat16 and a tokenizer of single bytes; tests only read it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "backbone"
    byte_tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=byte_tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder
