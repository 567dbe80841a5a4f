"""What accelerate cannot do with a wrapped model: cut each text over several devices.

Under context and sequence parallelism each device attends with its part of a text, and the parts are joined inside the
attention operator. The prefix, which stands before the whole text, would be taken for tokens of each part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from parscale.compat.accelerate import extend_prepare
from parscale.streams.state import find_state


def keep_texts_whole() -> None:
    """Makes `Accelerator.prepare` refuse a wrapped model where it would cut texts."""
    extend_prepare(_prepare)


def _prepare(original: Callable[..., Any], self: Any, *objects: Any, **kwargs: Any) -> Any:
    config = self.parallelism_config
    if config is not None and (config.cp_enabled or config.sp_enabled) and any(map(_runs_streams, objects)):
        raise ValueError(
            "Context and sequence parallelism cut a text over devices, and the streams' prefixes stand before all of "
            "it: set cp_size and sp_size to 1, and shard the model by FSDP2 or ZeRO-3 in their place."
        )
    return original(self, *objects, **kwargs)


def _runs_streams(prepared: object) -> bool:
    """Whether it is a model with more than one stream, also inside an adapter."""
    modules = prepared.modules() if isinstance(prepared, nn.Module) else ()
    return any((state := find_state(module)) is not None and state.num_streams > 1 for module in modules)
