"""Which parameters of the sets of streams train.

Whether a parameter trains is a mark on the parameter, so it is the model's, and not a thread's. While `use_streams`
blocks are open, those of all threads count: a set trains if one of them chose it. The set that is active outside of
blocks rests then, unless a pass outside of them is differentiated. When the last block ends, all is as it was.
"""

from __future__ import annotations

import functools
import threading
import weakref

import torch
from torch import nn

from parscale.compat.torch import tensor_hooks
from parscale.streams.calls import innermost_block
from parscale.streams.sets import StreamSet
from parscale.streams.state import ParScaleState

LOCK = threading.RLock()  # held while it is decided what trains


def parameters_of(state: ParScaleState, streams: StreamSet | None) -> list[nn.Parameter]:
    """The parameters of a set; none for `None`, or while its tensors are buffers, which never train."""
    tensors = {} if streams is None else state.tensors(streams)
    return [tensor for tensor in tensors.values() if isinstance(tensor, nn.Parameter)]


def decide_what_trains(state: ParScaleState) -> None:
    """Freezes and releases each set's parameters as the open blocks and the choice outside of them say."""
    if state.blocks.trained_outside is None:  # no block is open
        return
    chosen = {block.chosen: block for block in state.blocks.innermost}
    used_outside = state.blocks.used_outside or not set(state.blocks.trainers) <= {
        block.thread for block in state.blocks.innermost
    }
    for streams in state.sets.values():
        for parameter in parameters_of(state, streams):
            if streams in chosen:
                trains = chosen[streams].trains.get(parameter, True)
            elif state.blocks.innermost and streams is state.default and not used_outside:
                trains = False
            else:
                trains = state.blocks.trained_outside.get(parameter, parameter.requires_grad)
            train(parameter, trains)


def use_outside_of_blocks(state: ParScaleState) -> None:
    """Before a pass that is differentiated: outside of blocks the model's own set trains, whatever blocks there are."""
    if innermost_block(state.calls) is not None:
        return
    # a block that another thread opens from now on leaves the set alone
    state.blocks.trainers.add(threading.current_thread())
    if state.blocks.innermost and not state.blocks.used_outside:
        with LOCK:
            state.blocks.used_outside = True
            decide_what_trains(state)


def train(parameter: nn.Parameter, trains: bool) -> None:
    """Freezes a parameter or not, without taking the gradient from a forward pass that is not differentiated yet.

    autograd drops what comes back for a parameter that was frozen meanwhile; a hook delivers it.
    """
    if parameter.requires_grad is trains:
        return
    if not trains and not any(getattr(hook, "func", None) is _deliver for hook in tensor_hooks(parameter)):
        parameter.register_hook(functools.partial(_deliver, weakref.ref(parameter)))
    parameter.requires_grad_(trains)


def _deliver(reference: weakref.ReferenceType[nn.Parameter], gradient: torch.Tensor) -> None:
    parameter = reference()
    if parameter is not None and not parameter.requires_grad:
        gradient = gradient.detach()
        parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
