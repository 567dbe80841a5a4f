"""The only caller of transformers' and PEFT's `from_pretrained`: no code from a checkpoint runs, no pickle is read."""

from __future__ import annotations

import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from parscale.compat.transformers import model_mapping, without_adapter
from parscale.errors import IncompatibleVersionError, RefusedCheckpointError
from parscale.format.folders import ADAPTER_CONFIG, Checkpoint, read_json, require_regular
from parscale.format.headers import read_header

ADAPTER = "adapter_model.safetensors"
_RELEASED = "ParScale/"  # the owner of the released checkpoints


def read_pretrained(reader: Any, source: str | os.PathLike[str], *arguments: Any, **options: Any) -> Any:
    """Calls `reader.from_pretrained(source)`, for a configuration, a tokenizer or a model.

    Code in a checkpoint does not run, and weights are read from safetensors only, unless `options` say otherwise. An
    adapter in a model's folder is not applied, and a warning says so: PEFT can load it.

    Args:
        reader: an `Auto...` class of transformers, or a model's class.
        source: a folder, or a name on the Hugging Face Hub.
        *arguments: passed to `from_pretrained`.
        **options: passed to `from_pretrained`.

    Raises:
        RefusedCheckpointError: the source needs its own code, or a package that is not installed.
        ValueError: a file is damaged, or not a regular file.
        OSError: a file does not exist or cannot be read.
    """
    options = {"trust_remote_code": False} | options
    if os.path.isdir(source):
        for path in Path(source, options.get("subfolder") or "").glob("*"):
            require_regular(path)
            if path.name == GENERATION_CONFIG_NAME:
                read_json(path)  # reports damage, which transformers does not
    if _reads_weights(reader):
        options = {"use_safetensors": True} | options | {"adapter_kwargs": without_adapter()}
    try:
        return reader.from_pretrained(source, *arguments, **options)
    except ValueError as error:
        if options["trust_remote_code"] or "trust_remote_code" not in str(error):
            raise
        raise RefusedCheckpointError(
            f"{source} needs to run its own code, which parscale does not do: if you trust it, load the model with "
            "transformers and trust_remote_code=True, and pass it to parscale.wrap, or as backbone= to parscale.load."
        ) from error
    except IncompatibleVersionError:
        raise
    except ImportError as error:
        raise RefusedCheckpointError(f"{source} needs a package that is not installed: {error}") from error


def read_adapter(model: Any, folder: Path) -> Any:
    """Loads the adapter in a folder, in safetensors, onto a model.

    Raises:
        ValueError: its weights are damaged or in another format.
        OSError: they do not exist.
    """
    from peft import PeftModel

    weights = Checkpoint(folder).file(ADAPTER)
    if weights is None:
        raise FileNotFoundError(f"{folder} has no {ADAPTER}: the adapter's weights are missing.")
    read_header(weights)
    return PeftModel.from_pretrained(model, str(folder))


def warn_of_adapter(checkpoint: Checkpoint) -> None:
    """Warns that an adapter in a model's folder is not applied, and says how to apply it."""
    if checkpoint.file(ADAPTER_CONFIG) is not None:
        warnings.warn(
            f"{checkpoint} also holds an adapter ({ADAPTER_CONFIG}), which is not applied: "
            f"peft.PeftModel.from_pretrained(model, {str(checkpoint)!r}) puts it on the model.",
            stacklevel=2,
        )


@cache
def warn_of_licences(name: str) -> None:
    """Says once that a released checkpoint, known by its name on the Hub, carries two licences."""
    if name.startswith(_RELEASED):
        warnings.warn(
            f"{name} carries two licences: Apache-2.0 in its card's metadata, academic use only in the card's text; "
            "ask its authors before any other use.",
            stacklevel=2,
        )


def _reads_weights(reader: Any) -> bool:
    return model_mapping(reader) is not None or (isinstance(reader, type) and issubclass(reader, PreTrainedModel))
