"""What belongs to a call of a wrapped model, and not to the model: which set of streams runs, and what the pass makes.

Any number of threads may call one model at once, each with a set of streams of its own, and so may the tasks of an
event loop. Two things keep them apart:

- :class:`Block`, what ``with model.use_streams(name):`` chose. A context variable holds the open ones, so that a block
  lasts for the code inside it, also in functions that it awaits, and for no other thread or task.
- :class:`Call`, the record of the forward pass under way. Each thread has one, since a pass never leaves its thread.
  Layers that are recomputed in a backward pass may run in another thread, and take with them what they need of it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


class Block:
    """A block of code in which one model runs with a chosen set of streams.

    Args:
        state: of the model; two models in one block do not disturb each other.
        chosen: the set; ``None`` is the plain backbone.
    """

    def __init__(self, state: Any, chosen: Any) -> None:
        self.state = state
        self.chosen = chosen
        self.thread = threading.current_thread()
        self.trains: dict[nn.Parameter, bool] = {}  # which of the set's parameters train; those not named do


_OPEN: contextvars.ContextVar[tuple[Block, ...]] = contextvars.ContextVar("parscale_blocks", default=())


@dataclasses.dataclass
class Call:
    """The forward pass under way in this thread, or the last one.

    Args:
        in_flight: the set that it runs with. ``None``: the plain backbone.
        trains: the set's parameters, and whether they train; filled where layers are recomputed.
        part: what runs and is mixed: the backbone, or a tower beside it.
        running: itself, or its replica on another device.
        recorder: is shown the keys and values of each attention layer.
        aggregating: whether the streams are mixed.
        masks: what was made of masks for all layers, those with room for the prefix by the id of the mask they extend.
        pooled: what a pooler inside the backbone was given, and its mixture.
        mask_around: the mask ``(B, K)`` that the module around the backbone was called with, without positions.
        tokens: of ``transform="prompt"``: where the tokens stand, ``(R, S)``; ``None``: everywhere.
        cache: of ``transform="prompt"``: the cache of the pass.
        block: the innermost open block, for compiled code, which cannot ask a context variable.
    """

    in_flight: Any = None
    trains: list[tuple[nn.Parameter, bool]] = dataclasses.field(default_factory=list)
    part: Any = None
    running: Any = None
    recorder: Callable[[nn.Module, torch.Tensor, torch.Tensor], None] | None = None
    aggregating: bool = True
    masks: dict[Any, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    pooled: tuple[torch.Tensor, torch.Tensor] | None = None
    mask_around: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    cache: Any = None
    block: Block | None = None


class _NotCopied:
    """Belongs to threads that run: in a copy or a pickle it is new."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return type(self)()


class Calls(_NotCopied, threading.local):
    """A model's calls, for each thread its own."""

    def __init__(self) -> None:
        self.call = Call()


class Blocks(_NotCopied):
    """The open blocks of a model that decide which parameters train; see :mod:`parscale.streams.trainability`."""

    def __init__(self) -> None:
        self.innermost: list[Block] = []  # of each thread or task
        self.trained_outside: dict[nn.Parameter, bool] | None = None  # while there are any: what trains without them
        self.used_outside = False  # while there are any: whether a pass outside of them was differentiated
        self.trainers: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # threads with such passes, now or before


def innermost_block(state: Any) -> Block | None:
    """The innermost block around the caller that chose a set for the model of ``state``."""
    if torch.compiler.is_compiling():
        block: Block | None = state.call.block
        return block
    return next((block for block in reversed(_OPEN.get()) if block.state is state), None)


@contextlib.contextmanager
def opened(block: Block) -> Iterator[None]:
    """The block, for the caller's thread or task, as long as this one lasts."""
    call = block.state.call
    around = call.block
    _OPEN.set((*_OPEN.get(), block))
    call.block = block
    try:
        yield
    finally:
        _OPEN.set(tuple(other for other in _OPEN.get() if other is not block))
        call.block = around
