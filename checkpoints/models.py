"""Loads the checkpoints that a user names, with their tokenizers."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from parscale import load
from parscale.config import STREAMS_OFF
from parscale.format.architectures import class_named
from parscale.format.folders import (
    ADAPTER_CONFIG,
    CONFIG,
    PLAIN,
    STREAMS_CONFIG,
    STREAMS_ONLY,
    Checkpoint,
    backbone_location,
)
from parscale.format.models import load_plain_model
from parscale.format.pretrained import read_pretrained
from parscale.format.values import configuration_of
from parscale.streams.backbones import generates_text
from parscale.streams.brief_runs import is_machine_error
from parscale.streams.choosing import no_such_set

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "spiece*")
# The Hub is asked for one file at a time.
_ON_THE_HUB = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
_PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


def open_checkpoint(
    checkpoint: str, *, streams: str | None = None, device: str | None = None
) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """Loads a checkpoint for inference, with its tokenizer if it has one.

    Args:
        checkpoint: a folder, or a name on the Hugging Face Hub; with streams, or a plain model.
        streams: the set of streams to switch to, or `"off"` for the plain backbone; by default the active set.
        device: the device for the model; by default a GPU if there is one.

    Returns:
        The model in eval mode, and its tokenizer or None.

    Raises:
        ValueError: the set of streams or the device does not exist, or the checkpoint is damaged or not a causal
            language model.
        OSError: the checkpoint does not exist.
    """
    target_device = _device(device)
    is_plain = Checkpoint(checkpoint).kind() == PLAIN
    if is_plain and streams not in (None, STREAMS_OFF):
        raise ValueError(f"{checkpoint} is a plain model without a set of streams {streams!r}; omit the set.")
    model = load_any(checkpoint)
    require_language_model(model, checkpoint)
    if not is_plain and streams is not None:
        if streams != STREAMS_OFF and streams not in (sets := model.parscale.sets):
            raise no_such_set(streams, sets, f", and {STREAMS_OFF!r} for the plain backbone.", checkpoint)
        model.set_streams(None if streams == STREAMS_OFF else streams)
    return model.to(target_device).eval(), find_tokenizer(checkpoint)


def load_any(checkpoint: str, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """Loads a checkpoint's model, wrapped if it has streams, otherwise plain.

    Args:
        checkpoint: a folder, or a name on the Hugging Face Hub; with streams, or a plain model.
        dtype: by default the one that `config.json` names, without one that of the saved tensors.
        **options: passed to `parscale.load` or `from_pretrained`.

    Raises:
        ValueError: the checkpoint is damaged, or has an adapter that is not merged.
        OSError: it does not exist.
    """
    require_merged(checkpoint)
    read = load_plain if Checkpoint(checkpoint).kind() == PLAIN else load
    return read(checkpoint, dtype=dtype, **options)


def require_merged(checkpoint: str) -> None:
    """Refuses streams that an adapter was saved with: without the adapter they are another model.

    Raises:
        ValueError: there is an adapter beside the streams.
        OSError: there is no such checkpoint.
    """
    folder = Checkpoint(checkpoint)
    if folder.kind() == STREAMS_ONLY and folder.file(ADAPTER_CONFIG) is not None:
        raise ValueError(
            f"{checkpoint} holds an adapter ({ADAPTER_CONFIG}) and the streams that were trained with it, and without "
            "it they are another model. Merge it, put the tokenizer's files into the new folder, and name that: "
            f"peft.PeftModel.from_pretrained(parscale.load({checkpoint!r}), {checkpoint!r}).merge_and_unload()"
            ".save_pretrained(FOLDER)"
        )


def text_config(checkpoint: str) -> Any:
    """The configuration of a checkpoint's backbone, as far as it concerns text; no weight is read.

    Args:
        checkpoint: a folder, or a name on the Hugging Face Hub; with streams, or a plain model.

    Raises:
        ValueError: it is damaged.
        OSError: it does not exist.
    """
    folder, place = Checkpoint(checkpoint), checkpoint
    if folder.kind() == STREAMS_ONLY:
        place = backbone_location(folder, folder.read_json(STREAMS_CONFIG)) or checkpoint
    with configuration_of(Checkpoint(place)):
        return read_pretrained(AutoConfig, place).get_text_config()


def require_language_model(model: PreTrainedModel, checkpoint: str) -> None:
    """Checks that a model is a causal language model, unlike an encoder.

    Raises:
        ValueError: it is not.
    """
    if not generates_text(model):
        raise ValueError(
            f"{checkpoint} holds a {type(model).__name__}, but this is for causal language models: use it from Python, "
            "by parscale.load."
        )


def load_plain(source: str, *, dtype: torch.dtype | None = None, any_task: bool = False, **options: Any) -> Any:
    """Loads a model without streams.

    Args:
        source: a folder, or a name on the Hugging Face Hub.
        dtype: by default the one that `config.json` names, without one that of the saved tensors.
        any_task: load the class that it was saved from, also an encoder; otherwise a causal language model.
        **options: passed to `from_pretrained`.

    Raises:
        ValueError: its files are damaged or do not fit its configuration, or it needs its own code.
    """
    checkpoint = Checkpoint(source)
    reader: Any = _own_class(checkpoint) if any_task else AutoModelForCausalLM
    try:
        model, report = load_plain_model(checkpoint, reader, dtype=dtype or "auto", **options)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # whatever an invalid configuration raises
        if is_machine_error(error):
            raise
        if isinstance(error, RuntimeError):  # tensors whose shapes differ from the configuration
            raise ValueError(f"The weights of {source} do not fit its {CONFIG}: {error}") from error
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"No model can be made from {source}: its {CONFIG} is damaged ({problem}).") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{source} lacks {_few(missing)}: it is damaged, or not a {type(model).__name__}.")
    if unknown := sorted(report["unexpected_keys"]):
        warnings.warn(f"{source} holds {_few(unknown)}, which a {type(model).__name__} does not use.", stacklevel=2)
    return model


def _own_class(checkpoint: Checkpoint) -> Any:
    """The class that a plain checkpoint names, unless `AutoModelForCausalLM` chooses the same."""
    names = checkpoint.read_json(CONFIG).get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    cls = None if str(name).endswith(("ForCausalLM", "LMHeadModel")) else class_named(name)
    return AutoModelForCausalLM if cls is None else cls


def find_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint; None if it has none.

    Raises:
        ValueError: the tokenizer cannot be read.
    """
    folder = Path(checkpoint)
    if folder.is_dir():
        found = any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES)
    else:
        source = Checkpoint(checkpoint)
        found = any(source.file(name) is not None for name in _ON_THE_HUB)
    if not found:
        return None
    try:
        return read_pretrained(AutoTokenizer, checkpoint)
    except Exception as error:
        raise ValueError(f"The tokenizer of {checkpoint} cannot be read: {error}") from error


def copy_processor(checkpoint: str, folder: Path) -> None:
    """Copies into a folder what a processor needs beside the tokenizer, for images and sounds, where there is such.

    Args:
        checkpoint: a folder, or a name on the Hugging Face Hub.
        folder: an existing folder.

    Raises:
        OSError: a file cannot be read or written.
    """
    source = Checkpoint(checkpoint)
    for name in _PROCESSOR_FILES:
        if (path := source.file(name)) is not None:
            shutil.copyfile(path, folder / name)


def require_tokenizer(tokenizer: PreTrainedTokenizerBase | None, checkpoint: str) -> PreTrainedTokenizerBase:
    """Returns the tokenizer, or raises an error if there is none.

    Args:
        tokenizer: the tokenizer of the model, or None.
        checkpoint: its name, for the error message.

    Returns:
        The tokenizer.

    Raises:
        ValueError: there is none.
    """
    if tokenizer is None:
        raise ValueError(f"{checkpoint} has no tokenizer; copy the files of the backbone's tokenizer into its folder.")
    return tokenizer


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()  # of a "meta" device, which holds nothing, this is an error too
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:  # without CUDA, torch raises an AssertionError
        raise ValueError(f"The device {device!r} is not available; give cpu, or a GPU that torch sees.") from error
