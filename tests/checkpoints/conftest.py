"""Tiny checkpoints to train, and runs in processes of their own."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from parscale import wrap

TEXT = "".join(f"def f{number}(x):\n    return x + {number}\n\n" for number in range(60))


@pytest.fixture(scope="module", autouse=True)
def _runs_are_unflushed(unflushed):
    """For all tests of this room."""


@pytest.fixture(scope="session")
def full(backbone, tmp_path_factory):
    """A full checkpoint of three streams; tests only read it."""
    return _save(backbone, tmp_path_factory.mktemp("trained") / "full", "save_pretrained")


@pytest.fixture(scope="session")
def streams_only(backbone, tmp_path_factory):
    """The same streams alone."""
    return _save(backbone, tmp_path_factory.mktemp("trained") / "streams", "save_streams")


def _save(backbone, folder, how):
    model = LlamaForCausalLM.from_pretrained(backbone, dtype=torch.bfloat16)
    wrap(model, 3, prefix_length=4, init="random", seed=1)
    getattr(model, how)(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    """Some text, about 2,000 tokens."""
    path = tmp_path / "text.py"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def sentences(tmp_path_factory):
    """A file of 30 short sentences, about 800 tokens."""
    path = tmp_path_factory.mktemp("sentences") / "text.txt"
    path.write_text("".join(f"Sentence {number} of a text.\n" for number in range(30)))
    return path
