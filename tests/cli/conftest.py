"""Tiny checkpoints with streams, and text."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import parscale

TEXT = "".join(f"def f{number}(x):\n    return x + {number}\n\n" for number in range(60))


@pytest.fixture(scope="module", autouse=True)
def _runs_are_unflushed(unflushed):
    """For all tests of this room."""


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
