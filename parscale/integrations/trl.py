"""The reference model of TRL's trainers: the same model, with its streams.

Without an adapter, a trainer makes its reference (or teacher) model by loading `model.config.name_or_path` again. For
a model that was wrapped in this process, that name means the plain backbone: rewards would not be zero at the first
step, and the KL divergence to the reference would include the effect of the streams. So the reference of a wrapped
model is a copy of it. To use the plain backbone as the reference, pass it as `ref_model`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from parscale.compat.accelerate import hook_of
from parscale.compat.trl import extend_reference
from parscale.distributed.parallel import is_sharded
from parscale.streams.state import ALIVE, ParScaleState, find_state


class _NameOfWrapped(str):
    """The name of a wrapped model's backbone, in the form that TRL reads from the model's configuration."""

    state: ParScaleState


def keep_reference() -> None:
    """If TRL is installed, makes its reference for a wrapped model a copy of that model."""
    extend_reference(_name, _create)


def _name(original: Callable[..., str], config: object) -> str:
    name = original(config)
    for state in ALIVE:
        if find_state(state.model) is state and state.model.config is config:
            marked = _NameOfWrapped(name)
            marked.state = state
            return marked
    return name


def _create(original: Callable[..., Any], model_id: str, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(model_id, _NameOfWrapped) or model_id.state.active is None:
        return original(model_id, *args, **kwargs)
    model = model_id.state.model
    if is_sharded(model):
        raise ValueError(
            f"TRL's reference would be the plain backbone {str(model_id)!r} without this {type(model).__name__}'s "
            "streams, and a model in parts cannot be copied: pass ref_model=, or save the model and pass the folder."
        )
    reference = copy.deepcopy(model)
    if hook_of(reference) is None:
        reference.__dict__.pop("forward", None)  # left by an earlier trainer, bound to the original model
    return reference.requires_grad_(False).eval()
