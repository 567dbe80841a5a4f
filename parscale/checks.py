"""Whether the parts of a checkpoint fit each other: what its configuration says, and what its files hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from parscale.auto import backbone_config
from parscale.config import NUM_STREAMS, SET_NAME, SET_PATTERN, SETS, ParScaleConfig
from parscale.folders import CONFIG, TYPE_SUFFIX, Checkpoint
from parscale.headers import StoredTensor
from parscale.naming import PARAMETERS
from parscale.streams import DEFAULT


def numbers(checkpoint: Checkpoint, fields: Mapping[str, Any]) -> ParScaleConfig:
    """P, T, the smoothing and so on.

    Raises:
        ValueError: one is missing, of the wrong type or out of range.
    """
    try:
        return ParScaleConfig.from_fields(fields)
    except ValueError as error:
        raise ValueError(f"The configuration of {checkpoint} is damaged: {error}") from error


def set_names(checkpoint: Checkpoint, fields: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """The active set's name (``None``: none is active) and the further sets' of a full checkpoint.

    Raises:
        ValueError: what should be a name is none, or one appears twice.
    """
    name, further = fields.get(SET_NAME, DEFAULT), fields.get(SETS, [])
    names = further if name is None else [name, *further] if isinstance(further, list) else None
    if not isinstance(names, list) or not all(isinstance(x, str) and re.fullmatch(SET_PATTERN, x) for x in names):
        raise ValueError(f"{CONFIG} of {checkpoint} should name sets of streams, and names {name!r} and {further!r}.")
    if len(set(names)) < len(names):
        raise ValueError(f"{CONFIG} of {checkpoint} names a set of streams twice: {', '.join(names)}.")
    return name, further


def check_streams(checkpoint: Checkpoint, streams: ParScaleConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Refuses tensors that are not of P streams and T tokens, before anything of that size is made.

    Raises:
        ValueError: names the tensor.
    """
    P, T = streams.num_streams, streams.prefix_length
    if P == 1 and stored:
        raise ValueError(f"{checkpoint} has {min(stored)}, and one stream ({NUM_STREAMS} = 1) has no such tensor.")
    if P > 1 and not stored:
        parts = ", ".join(PARAMETERS[streams.transform])
        raise ValueError(f"{checkpoint} should hold {P} streams, and has no {parts} or aggregate_layer.")
    for name, tensor in stored.items():
        shape = tensor.shape
        if tensor.dtype not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{name} of {checkpoint} is of {tensor.dtype}; streams are floating-point numbers.")
        if name.endswith(("prefix_k", "prefix_v")) and (len(shape) != 4 or (shape[0], shape[2]) != (P, T)):
            wanted = f"({P}, heads, {T}, head size)"
        elif name.endswith("aggregate_layer.2.weight") and (len(shape) != 2 or shape[0] != P):
            wanted = f"({P}, hidden size)"
        elif name.endswith("prompt") and (len(shape) != 3 or shape[:2] != (P, T)):
            wanted = f"({P}, {T}, hidden size)"
        elif name.endswith("stream_down") and (len(shape) != 3 or shape[:2] != (P, streams.rank)):
            wanted = f"({P}, {streams.rank}, inputs)"
        elif name.endswith("stream_up") and (len(shape) != 3 or shape[::2] != (P, streams.rank)):
            wanted = f"({P}, outputs, {streams.rank})"
        else:
            continue
        raise ValueError(f"{name} of {checkpoint} is {shape}, and its configuration says {wanted}.")


def check_fit(checkpoint: Checkpoint, fields: Mapping[str, Any], config: Any) -> None:
    """Refuses a backbone for streams that were made for another, by its configuration alone.

    Args:
        checkpoint: streams only.
        fields: of its ``parscale_config.json``.
        config: the backbone's.

    Raises:
        ValueError: names what differs.
    """
    text = config.get_text_config()
    has = {
        "backbone_model_type": str(config.model_type).removesuffix(TYPE_SUFFIX),
        "backbone_hidden_size": getattr(text, "hidden_size", None),
        "backbone_num_layers": getattr(text, "num_hidden_layers", None),
    }
    for field, value in has.items():
        wanted = fields.get(field)
        if wanted is not None and value is not None and wanted != value:
            backbone = fields.get("base_model_name_or_path") or "a backbone without a name"
            raise ValueError(
                f"The backbone does not fit {checkpoint}: its {field.removeprefix('backbone_')} is {value}, and the "
                f"streams were made for {wanted} ({backbone}): give that one as backbone=."
            )


def check_counts(checkpoint: Checkpoint, fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """Refuses numbers of layers, labels and so on that are absurd, before a configuration class counts up to them.

    Args:
        checkpoint: a full one.
        fields: of its ``config.json``, or of a part of it.
        tensors: in the checkpoint's files.

    Raises:
        ValueError: names the field.
    """
    held = sum(tensor.numel for tensor in tensors.values())
    for key, value in ((str(key), value) for key, value in fields.items()):  # labels are by number
        if isinstance(value, dict):
            check_counts(checkpoint, value, tensors)
            continue
        most = max(len(tensors), 2**10) if "layer" in key else max(held, 2**24)
        if isinstance(value, int) and value > most and re.search(r"^(num|n|d)_|_(layers?|size|dim)$", key):
            raise ValueError(
                f"{CONFIG} of {checkpoint} says {key} = {value}, and its files hold {held} numbers in {len(tensors)} "
                "tensors: it is damaged."
            )


def check_size(checkpoint: Checkpoint, cls: Any, config: Any, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuses a configuration that describes a far larger model than the files hold, before it is allocated.

    Args:
        checkpoint: a full one.
        cls: the backbone's class.
        config: the backbone's.
        tensors: in the checkpoint's files.

    Raises:
        ValueError: it does, or it describes no model at all.
    """
    model = _on_meta(checkpoint, cls, config)
    described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    held = sum(tensor.numel for tensor in tensors.values())
    if described > 4 * held + 2**24:
        problems = "; ".join(differences(checkpoint, cls, config, tensors)[:3])
        raise ValueError(
            f"{CONFIG} of {checkpoint} describes a model of {described} numbers, and its files hold {held}. {problems}"
        )


def differences(checkpoint: Checkpoint, cls: Any, config: Any, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Tensors that have another shape in the files than the configuration says; arguments as :func:`check_size`."""
    described = _on_meta(checkpoint, cls, config).state_dict()
    return [
        f"{name} is {tensors[name].shape} in the files and should be {tuple(described[name].shape)}"
        for name in sorted(described.keys() & tensors.keys())
        if tensors[name].shape != described[name].shape
    ]


@contextmanager
def configuration_of(checkpoint: Checkpoint, faults: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """In this block a class reads a configuration: what goes wrong there is the configuration's fault.

    Args:
        checkpoint: whose configuration it is.
        faults: the errors that a configuration can cause there; of these, not those that are the machine's.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except faults as error:
        raise ValueError(
            f"{CONFIG} of {checkpoint} does not describe a model: it is damaged, or needs another version of "
            f"transformers ({type(error).__name__}: {error})."
        ) from error


def _on_meta(checkpoint: Checkpoint, cls: Any, config: Any) -> Any:
    """The backbone that the configuration describes, without weights."""
    with configuration_of(checkpoint), torch.device("meta"):
        config = backbone_config(config)
        config._attn_implementation = "eager"  # the one that needs nothing installed
        return cls(config)
