"""Reading what a user names: checkpoints with their tokenizers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from parscale import load
from parscale.checkpoints.description import PLAIN, kind_of
from parscale.format.architectures import class_named
from parscale.format.folders import CONFIG, Checkpoint
from parscale.format.models import load_plain_model
from parscale.format.pretrained import read_pretrained
from parscale.streams.backbones import writes_text

STREAMS_OFF = "off"
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "spiece*")


def open_checkpoint(
    checkpoint: str, *, streams: str | None = None, device: str | None = None
) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """Load a checkpoint for use, not for training, with its tokenizer if it has one.

    Args:
        checkpoint: a folder, or a name on the Hugging Face Hub; with streams, or a plain model.
        streams: the set of streams to switch to, or `"off"` for the plain backbone; by default the active set.
        device: where to put the model; by default on a GPU if there is one.

    Returns:
        The model, ready for use, and its tokenizer or None.

    Raises:
        ValueError: there is no such set of streams or device, or the checkpoint is damaged or no causal language model.
        OSError: there is no such checkpoint.
    """
    place = _device(device)
    is_plain = kind_of(Checkpoint(checkpoint)) == PLAIN
    if is_plain and streams not in (None, STREAMS_OFF):
        raise ValueError(f"{checkpoint} is a plain model without a set of streams {streams!r}; leave the set out.")
    model = load_any(checkpoint)
    require_language_model(model, checkpoint)
    if not is_plain and streams is not None:
        model.set_streams(None if streams == STREAMS_OFF else streams)
    return model.to(place).eval(), find_tokenizer(checkpoint)


def load_any(checkpoint: str, *, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """A checkpoint's model, wrapped or plain as it is.

    Args:
        checkpoint: a folder, or a name on the Hugging Face Hub; with streams, or a plain model.
        dtype: as saved unless given.
        **options: for `parscale.load` or `from_pretrained`.

    Raises:
        ValueError: it is damaged.
        OSError: there is no such checkpoint.
    """
    read = load_plain if kind_of(Checkpoint(checkpoint)) == PLAIN else load
    return read(checkpoint, dtype=dtype, **options)


def require_language_model(model: PreTrainedModel, checkpoint: str) -> None:
    """Refuses what does not read and write text, such as an encoder.

    Raises:
        ValueError: it does not.
    """
    if not writes_text(model):
        raise ValueError(
            f"{checkpoint} holds a {type(model).__name__}, and this is for causal language models: use it from Python, "
            "by parscale.load."
        )


def load_plain(source: str, *, dtype: torch.dtype | None = None, any_task: bool = False, **options: Any) -> Any:
    """A model without streams.

    Args:
        source: a folder, or a name on the Hugging Face Hub.
        dtype: as saved unless given.
        any_task: of the class that it was saved from, also an encoder; otherwise a causal language model.
        **options: for `from_pretrained`.

    Raises:
        ValueError: its files are damaged or do not fit its configuration, or it needs code of its own.
    """
    checkpoint = Checkpoint(source)
    reader: Any = _own_class(checkpoint) if any_task else AutoModelForCausalLM
    try:
        model, report = load_plain_model(checkpoint, reader, dtype=dtype or "auto", **options)
    except (OSError, ValueError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:  # of tensors in other shapes than the configuration says
        raise ValueError(f"The weights of {source} do not fit its {CONFIG}: {error}") from error
    except Exception as error:  # whatever a configuration without sense leads to
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"No model can be made of {source}, its {CONFIG} is damaged ({problem}).") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{source} lacks {_few(missing)}: it is damaged, or no {type(model).__name__}.")
    if unknown := sorted(report["unexpected_keys"]):
        warnings.warn(f"{source} holds {_few(unknown)}, which a {type(model).__name__} does not use.", stacklevel=2)
    return model


def _own_class(checkpoint: Checkpoint) -> Any:
    """The class that a plain checkpoint names, unless that is what `AutoModelForCausalLM` chooses."""
    names = checkpoint.read_json(CONFIG).get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    cls = None if str(name).endswith(("ForCausalLM", "LMHeadModel")) else class_named(name)
    return AutoModelForCausalLM if cls is None else cls


def find_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer that belongs to a checkpoint, or None if its folder has none.

    Raises:
        ValueError: the tokenizer cannot be read.
    """
    folder = Path(checkpoint)
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in _TOKENIZER_FILES):
        return None
    try:
        return read_pretrained(AutoTokenizer, checkpoint)
    except Exception as error:
        raise ValueError(f"The tokenizer of {checkpoint} cannot be read: {error}") from error


def require_tokenizer(tokenizer: PreTrainedTokenizerBase | None, checkpoint: str) -> PreTrainedTokenizerBase:
    """The tokenizer, once it is known that there is one.

    Args:
        tokenizer: what was found beside the model, or None.
        checkpoint: as the error calls it.

    Returns:
        The tokenizer.

    Raises:
        ValueError: there is none.
    """
    if tokenizer is None:
        raise ValueError(f"{checkpoint} holds no tokenizer; put the files of the backbone's tokenizer beside it.")
    return tokenizer


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"There is no device {device!r} here; give cpu, or a GPU that torch sees.") from error
    return place
