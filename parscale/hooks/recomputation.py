"""Gradient checkpointing: layers that are computed again in the backward pass use the streams of their forward pass.

By then another set may be active, or other parameters may be trainable, and on a GPU another thread runs them. So what
layers need of the state of the call (`parscale.streams.calls.CallState`) is bound to each function that is recomputed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from parscale.compat.transformers import checkpointing_function, set_checkpointing_function
from parscale.streams.calls import CallState
from parscale.streams.state import ParScaleState


def recompute_with_own_streams(state: ParScaleState, module: nn.Module) -> None:
    """Before a pass with gradients: makes the recomputed layers of `module` use the streams of this pass."""
    checkpointing, call = False, state.call
    for layer in module.modules():
        function = checkpointing_function(layer)
        if function is not None and not isinstance(function, _Checkpoint):
            set_checkpointing_function(layer, _Checkpoint(function, state))
        checkpointing |= function is not None
    tensors = state.tensors(call.in_flight) if checkpointing and call.in_flight is not None else {}
    call.trains = [(parameter, parameter.requires_grad) for parameter in tensors.values()]


def stop_recomputing(parts: Iterable[nn.Module]) -> None:
    """Restores the layers' own checkpointing function."""
    for layer in (layer for part in parts for layer in part.modules()):
        function = checkpointing_function(layer)
        if isinstance(function, _Checkpoint):
            set_checkpointing_function(layer, function.function)


class _Checkpoint:
    """A checkpointing function that carries the streams from the forward pass to the recomputation."""

    def __init__(self, function: Callable[..., Any], state: ParScaleState) -> None:
        self.function = function
        self.state = state

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self.state.call
        forward = call.for_recomputation(self.state.num_streams)
        if any(trains for _, trains in forward.trains) and not any(getattr(x, "requires_grad", False) for x in args):
            # without a differentiable input, a reentrant checkpoint would lose the prefix's gradient
            args = tuple(x.detach().requires_grad_() if _is_differentiable(x) else x for x in args)
        return self.function(functools.partial(self._run, forward, function), *args, **kwargs)

    def _run(self, forward: CallState, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.state.call.using_streams_of(forward), _trainable_as_in(forward):
            return function(*args, **kwargs)


@contextlib.contextmanager
def _trainable_as_in(forward: CallState) -> Iterator[None]:
    """In this block the parameters require gradients as they did in the pass `forward`."""
    changed = [parameter for parameter, trained in forward.trains if parameter.requires_grad is not trained]
    for parameter in changed:
        parameter.requires_grad_(not parameter.requires_grad)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not parameter.requires_grad)


def _is_differentiable(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()
