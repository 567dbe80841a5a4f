"""Checks that the parts of a checkpoint fit each other: its configuration and the tensors in its files."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers import PreTrainedConfig, PreTrainedModel

from parscale.compat.transformers import use_eager
from parscale.config import NUM_STREAMS, ParScaleConfig
from parscale.format.architectures import backbone_config
from parscale.format.folders import BACKBONE, CONFIG, TYPE_SUFFIX, Checkpoint
from parscale.format.headers import StoredTensor
from parscale.format.values import configuration_of
from parscale.streams.naming import PARAMETERS

BACKBONE_FACTS = ("backbone_model_type", "backbone_hidden_size", "backbone_num_layers")
_REGISTRATIONS = (register_module_module_registration_hook, register_module_parameter_registration_hook)


def check_streams(checkpoint: Checkpoint, streams: ParScaleConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Checks the shapes of tensors for P streams and T tokens, before anything of that size is allocated.

    Raises:
        ValueError: a tensor does not fit; the message names it.
    """
    P, T = streams.num_streams, streams.prefix_length
    if P == 1 and stored:
        raise ValueError(f"{checkpoint} has {min(stored)}, and one stream ({NUM_STREAMS} = 1) has no such tensor.")
    if P > 1 and not stored:
        parts = ", ".join(PARAMETERS[streams.transform])
        raise ValueError(f"{checkpoint} should have {P} streams, but has no {parts} or aggregate_layer.")
    for name, tensor in stored.items():
        shape = tensor.shape
        if tensor.dtype not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{name} of {checkpoint} is of {tensor.dtype}; streams are floating-point numbers.")
        own = streams.num_transformed
        if name.endswith(("prefix_k", "prefix_v")) and (len(shape) != 4 or (shape[0], shape[2]) != (own, T)):
            wanted = f"({own}, heads, {T}, head size)"
        elif name.endswith("aggregate_layer.2.weight") and (len(shape) != 2 or shape[0] != P):
            wanted = f"({P}, hidden size)"
        elif name.endswith("prompt") and (len(shape) != 3 or shape[:2] != (P, T)):
            wanted = f"({P}, {T}, hidden size)"
        elif name.endswith("stream_down") and (len(shape) != 3 or shape[:2] != (own, streams.rank)):
            wanted = f"({own}, {streams.rank}, inputs)"
        elif name.endswith("stream_up") and (len(shape) != 3 or shape[::2] != (own, streams.rank)):
            wanted = f"({own}, outputs, {streams.rank})"
        else:
            continue
        raise ValueError(f"{name} of {checkpoint} has the shape {shape}, but its configuration says {wanted}.")


def backbone_facts(config: PreTrainedConfig) -> dict[str, Any]:
    """What streams saved alone record of their backbone, by `BACKBONE_FACTS`; `None` for what it does not have.

    Args:
        config: the backbone's.
    """
    text = config.get_text_config()
    model_type = str(config.model_type).removesuffix(TYPE_SUFFIX)
    sizes = (getattr(text, name, None) for name in ("hidden_size", "num_hidden_layers"))
    return dict(zip(BACKBONE_FACTS, (model_type, *sizes), strict=True))


def check_fit(checkpoint: Checkpoint, fields: Mapping[str, Any], config: PreTrainedConfig) -> None:
    """Checks, by its configuration alone, that a backbone is the one that streams were made for.

    Args:
        checkpoint: streams only.
        fields: of its `parscale_config.json`.
        config: the backbone's.

    Raises:
        ValueError: they do not fit; the message names the difference.
    """
    for field, value in backbone_facts(config).items():
        wanted = fields.get(field)
        if wanted is not None and value is not None and wanted != value:
            backbone = fields.get(BACKBONE) or "a backbone without a name"
            raise ValueError(
                f"The backbone does not fit {checkpoint}: its {field.removeprefix('backbone_')} is {value}, but the "
                f"streams were made for {wanted} ({backbone}): pass that one as backbone=."
            )


def check_size(
    checkpoint: Checkpoint, cls: type[PreTrainedModel], config: PreTrainedConfig, tensors: Mapping[str, StoredTensor]
) -> None:
    """Checks, before allocation, that a configuration does not describe a far larger model than the files hold.

    Args:
        checkpoint: a full checkpoint.
        cls: the backbone's class.
        config: the backbone's configuration.
        tensors: the tensors in the checkpoint's files.

    Raises:
        ValueError: it does, or it does not describe a model.
    """
    model = _on_meta(checkpoint, cls, config, len(tensors))
    described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    held = sum(tensor.numel for tensor in tensors.values())
    if described > 4 * held + 2**24:
        problems = "; ".join(differences(checkpoint, cls, config, tensors)[:3])
        raise ValueError(
            f"{CONFIG} of {checkpoint} describes a model of {described} numbers, but its files hold {held}. {problems}"
        )


def differences(
    checkpoint: Checkpoint, cls: type[PreTrainedModel], config: PreTrainedConfig, tensors: Mapping[str, StoredTensor]
) -> list[str]:
    """Tensors whose shape in the files differs from the configuration; arguments as in `check_size`."""
    described = _on_meta(checkpoint, cls, config, len(tensors)).state_dict()
    return [
        f"{name} is {tensors[name].shape} in the files and should be {tuple(described[name].shape)}"
        for name in sorted(described.keys() & tensors.keys())
        if tensors[name].shape != described[name].shape
    ]


def _on_meta(checkpoint: Checkpoint, cls: type[PreTrainedModel], config: PreTrainedConfig, parts: int) -> Any:
    """The backbone that the configuration describes, without weights.

    Args:
        checkpoint: for the error message.
        cls: the backbone's class.
        config: the backbone's configuration.
        parts: number of tensors in the checkpoint's files; building a far larger model raises an error.
    """
    with configuration_of(checkpoint), torch.device("meta"), _few_modules(16 * parts + 2**12):
        config = backbone_config(config)
        use_eager(config)
        return cls(config)


@contextmanager
def _few_modules(most: int) -> Iterator[None]:
    """In this block this thread can only build models with at most `most` modules and parameters."""
    thread, count = threading.get_ident(), 0

    def counted(module: nn.Module, name: str, part: object) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > most:
            raise ValueError(f"it describes more than {most} modules and parameters")

    with ExitStack() as hooks:
        for register in _REGISTRATIONS:
            hooks.enter_context(register(counted))
        yield
