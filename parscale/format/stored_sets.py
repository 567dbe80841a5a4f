"""Sets of streams in streams-only folders, and the tensors of any set in the files of a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from safetensors import safe_open

from parscale.compat.conversion import stored_name
from parscale.config import DEFAULT_SET, FIELDS, INIT, SEED, ParScaleConfig
from parscale.format.checks import BACKBONE_FACTS, check_fit, check_streams
from parscale.format.folders import (
    BACKBONE,
    BACKBONE_PATH,
    FORMAT_VERSION,
    FULL,
    STREAMS_CONFIG,
    Checkpoint,
    set_name,
    stream_config,
)
from parscale.format.headers import StoredTensor
from parscale.format.untrusted import brief
from parscale.hooks.adding import add, fill
from parscale.streams.state import ParScaleState
from parscale.transforms import make_set

_STREAMS_FIELDS = {
    *("backbone_class", *BACKBONE_FACTS, BACKBONE, BACKBONE_PATH, "format_version", "name", "version"),
    *FIELDS,
}


def read_streams(checkpoint: Checkpoint) -> tuple[dict[str, Any], ParScaleConfig, dict[str, StoredTensor]]:
    """The fields of a streams-only checkpoint's JSON file, the configuration in them, and the tensors."""
    fields = checkpoint.read_json(STREAMS_CONFIG)
    unknown = sorted(fields.keys() - _STREAMS_FIELDS)
    if unknown or fields.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        warnings.warn(
            f"{STREAMS_CONFIG} of {checkpoint} was written by another version of parscale "
            f"({fields.get('version', 'unknown')}); ignored: {brief(', '.join(unknown)) or 'nothing'}.",
            stacklevel=2,
        )
    streams = stream_config(checkpoint, {key: fields[key] for key in fields.keys() & _STREAMS_FIELDS})
    stored = checkpoint.streams()
    check_streams(checkpoint, streams, stored)
    return fields, streams, stored


def values_in(model: Any, config: ParScaleConfig, stored: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """The tensors of a set by their released names in the model."""
    state: ParScaleState = model.parscale
    names = _names_in_model(model, state.names(make_set(state, DEFAULT_SET, config)), stored)
    values = {}
    for file in {tensor.file for tensor in stored.values()}:
        with safe_open(file, "pt") as tensors:
            for name in (name for name, tensor in stored.items() if tensor.file == file):
                values[names.get(name, name)] = tensors.get_tensor(name)
    return values


def _names_in_model(model: Any, released: Collection[str], stored: Collection[str]) -> dict[str, str]:
    """The released names of a set in the model, by their names in the files.

    If they have none in common, the files are those of the model with a head around this one, or of the one inside it.
    """
    names = {name if name in stored else stored_name(model, name): name for name in released}
    if not names.keys().isdisjoint(stored):
        return names
    prefix = f"{model.base_model_prefix}."
    inside = {name.removeprefix(prefix): name for name in released}
    return {name: inside.get(name.removeprefix(prefix), name) for name in stored}


@torch.inference_mode(False)  # loaded tensors can be trained
def add_saved_streams(model: Any, checkpoint: Checkpoint, name: str | None = None) -> None:
    """Adds a saved set of streams, as `parscale.methods.load_streams` describes."""
    if checkpoint.kind_with_streams() == FULL:
        raise ValueError(f"{checkpoint} has its own backbone: load_streams reads folders written by save_streams.")
    fields, streams, stored = read_streams(checkpoint)
    check_fit(checkpoint, fields, model.config)
    add(model.parscale, name or set_name(checkpoint, fields), streams, tensors=values_in(model, streams, stored))


def load_into_active(model: Any, checkpoint: Checkpoint) -> None:
    """Loads the values of a streams-only checkpoint into the active set.

    Args:
        model: wrapped, with streams of the same configuration as the checkpoint.
        checkpoint: the folder or repository.

    Raises:
        ValueError: it is damaged, no streams are active, or their configuration differs from the checkpoint's.
        OSError: a file cannot be read.
    """
    state: ParScaleState = model.parscale
    fields, saved, stored = read_streams(checkpoint)
    check_fit(checkpoint, fields, model.config)
    streams = state.active
    if streams is None or _lasting(saved) != _lasting(streams.config):
        ours = "none active" if streams is None else streams.config
        raise ValueError(
            f"{checkpoint} holds streams ({saved}) that differ from this model's ({ours}): wrap the model with the "
            "same configuration, or parscale.load the folder with backbone= and put the adapter on that."
        )
    fill(state, streams, values_in(model, saved, stored))


def _lasting(config: ParScaleConfig) -> dict[str, Any]:
    """What a configuration says of a set that runs, by field; not how the set started."""
    return {field: value for field, value in config.to_fields().items() if field not in (INIT, SEED)}
