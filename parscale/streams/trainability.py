"""Which parameters of the sets of streams are trainable.

`requires_grad` is a flag of the parameter, so it belongs to the model, not to a thread. The open `use_streams` blocks
of all threads count: a set is trainable if one of them chose it. The set that is active outside of blocks is then
frozen, unless a pass outside of them records gradients. When the last block ends, the flags are as before.
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

LOCK = threading.RLock()  # held while flags change


def parameters_of(state: ParScaleState, streams: StreamSet | None) -> list[nn.Parameter]:
    """The parameters of a set; none for `None`, or if its tensors are buffers, which are never trained."""
    tensors = {} if streams is None else state.tensors(streams)
    return [tensor for tensor in tensors.values() if isinstance(tensor, nn.Parameter)]


def decide_what_trains(state: ParScaleState) -> None:
    """Freezes or unfreezes each set's parameters, by the open blocks and the choice outside of them."""
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
            elif state.blocks.innermost and streams is state.selected and not used_outside:
                trains = False
            else:
                trains = state.blocks.trained_outside.get(parameter, parameter.requires_grad)
            set_trainable(parameter, trains)


def unfreeze_outside_of_blocks(state: ParScaleState) -> None:
    """Before a pass with gradients: the model's own set is trainable outside of blocks, whatever blocks are open."""
    if innermost_block(state.calls) is not None:
        return
    # a block that another thread opens from now on does not freeze the set
    state.blocks.trainers.add(threading.current_thread())
    if state.blocks.innermost and not state.blocks.used_outside:
        with LOCK:
            state.blocks.used_outside = True
            decide_what_trains(state)


def set_trainable(parameter: nn.Parameter, trainable: bool) -> None:
    """Freezes or unfreezes a parameter; a forward pass whose backward has not run yet keeps its gradient.

    autograd drops the gradient of a parameter that was frozen in the meantime; a hook delivers it.
    """
    if parameter.requires_grad is trainable:
        return
    if not trainable and not any(getattr(hook, "func", None) is _deliver for hook in tensor_hooks(parameter)):
        parameter.register_hook(functools.partial(_deliver, weakref.ref(parameter)))
    parameter.requires_grad_(trainable)


def _deliver(reference: weakref.ReferenceType[nn.Parameter], gradient: torch.Tensor) -> None:
    parameter = reference()
    if parameter is not None and not parameter.requires_grad:
        gradient = gradient.detach()
        parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient
