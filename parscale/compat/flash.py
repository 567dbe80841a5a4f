"""transformers: models whose attention is flash-attention, which runs on a GPU and in half precision only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from parscale.compat.names import needed
from parscale.compat.transformers import ConfigView, attn_implementation, is_flash

_HALF = (torch.float16, torch.bfloat16)
_NAME = "_attn_implementation_internal"  # of one configuration; `_attn_implementation` also sets those inside it


def flash_cannot_run(model: nn.Module) -> bool:
    """Whether a model names flash-attention, but has weights that are on no device yet, on the CPU, or in float32."""
    weights = (p for p in model.parameters() if p.is_floating_point())
    unfit = any(p.device.type in ("cpu", "meta") or p.dtype not in _HALF for p in weights)
    return unfit and bool(_named_flash(model))


@contextlib.contextmanager
def eager_for_flash(model: nn.Module) -> Iterator[None]:
    """In this block the parts of a model that name flash-attention run `"eager"`, which computes the same anywhere.

    `set_attn_implementation` gives one name to all parts, and looks for the package again to restore it.
    """
    named = _named_flash(model)
    try:
        for config, _ in named:
            needed(config, _NAME)
            setattr(config, _NAME, "eager")
        yield
    finally:
        for config, name in named:
            setattr(config, _NAME, name)


def _named_flash(model: nn.Module) -> list[tuple[Any, str]]:
    """The configurations of a model and its parts that name flash-attention, with that name."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [vars(module).get("config") for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if isinstance(config, ConfigView):
            config = config.original
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            waiting += vars(config).values()
    return [(config, name) for config in found.values() if is_flash(name := attn_implementation(config))]
