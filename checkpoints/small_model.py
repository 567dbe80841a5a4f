"""The path of the small language model in the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def small_model_path() -> Path:
    """The folder of a Qwen2 of 3.3 million parameters, pretrained on the source of Python's standard library.

    It holds a checkpoint with its tokenizer, for `AutoModelForCausalLM.from_pretrained`; `examples/` has the script
    that trained it.
    """
    return Path(str(files("parscale").joinpath("small_model")))
