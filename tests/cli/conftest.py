"""Tiny checkpoints with a tokenizer, made on the spot."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import parscale

TEXT = "".join(f"def f{number}(x):\n    return x + {number}\n\n" for number in range(60))


@pytest.fixture(scope="session")
def backbone(tmp_path_factory) -> Path:
    """A Llama of two layers in bfloat16 and a tokenizer of single bytes; tests only read it."""
    folder = tmp_path_factory.mktemp("cli") / "backbone"
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet | {"<end>": len(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet) + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=len(alphabet),
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def two_sets(backbone, tmp_path_factory) -> Path:
    """A full checkpoint in float32 with three streams, active, and a further set of two."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("cli") / "two_sets"
    model = LlamaForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    parscale.wrap(model, 3, prefix_length=5, init="random", seed=1)
    model.add_streams("other", 2, prefix_length=4, init="random", seed=2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path) -> Path:
    """Some text, about 2,000 tokens."""
    path = tmp_path / "text.py"
    path.write_text(TEXT)
    return path
