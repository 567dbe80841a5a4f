"""The common parts of the ways to put a prefix before keys and values.

Shapes: R = P*B rows, stream-major; K visible keys without the prefix; G key/value heads; D head size; T prefix tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from parscale.compat.transformers import ATTENTION_FUNCTIONS, eager_attention
from parscale.distributed.parallel import gather_heads
from parscale.streams.state import ParScaleState

Result = tuple[torch.Tensor, torch.Tensor | None]  # the output, and the weights if the implementation has them
AttentionFunction = Callable[..., Result]


def record(state: ParScaleState, module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
    """Passes an attention layer's keys and values, of all devices, to the recorder."""
    recorder = state.call.recorder
    assert recorder is not None
    mesh = next((layer.mesh for layer in state.layers if layer.module is module), None)
    if mesh is not None:
        key, value = gather_heads(key, mesh), gather_heads(value, mesh)
    recorder(module, key, value)


def backbone_function(module: nn.Module, name: str) -> AttentionFunction:
    """The function that the layer would call without streams."""
    return ATTENTION_FUNCTIONS[name] if name in ATTENTION_FUNCTIONS else eager_function(module, name)


def eager_function(module: nn.Module, name: str) -> AttentionFunction:
    """The attention function in a layer's own file, which runs as `"eager"`.

    Raises:
        ValueError: there is none; the message names the requested implementation, `name`.
    """
    function = eager_attention(type(module))
    if function is not None:
        return function
    raise ValueError(
        f"{type(module).__name__} has no attention function for attn_implementation={name!r}; "
        "choose another with model.set_attn_implementation(...)."
    )
