"""What belongs to a call of a wrapped model, and not to the model: which set of streams runs, and what the pass makes.

Any number of threads may call one model at once, each with a set of streams of its own, and so may the tasks of an
event loop. Two things keep them apart:

- `Block`, what `with model.use_streams(name):` chose. A context variable holds the open ones, so that a block
  lasts for the code inside it, also in functions that it awaits, and for no other thread or task.
- `Call`, the record of the forward pass under way. Each thread has one, since a pass never leaves its thread.
  Layers that are recomputed in a backward pass may run in another thread, and take with them what they need of it.

How calls run is set here and nowhere else: `Calls.choosing`, `Calls.recording` and `Calls.unmixed`
for a block of code, `Call.begin` for a pass.
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

from parscale.streams.passes import Adaptive, TwoPasses
from parscale.streams.sets import StreamSet

Recorder = Callable[[nn.Module, torch.Tensor, torch.Tensor], None]  # layer, keys and values (R, G, K, D)


class Block:
    """A block of code in which one model runs with a chosen set of streams.

    Args:
        calls: the model's; two models in one block do not disturb each other.
        chosen: the set; `None` is the plain backbone.
    """

    def __init__(self, calls: Calls, chosen: StreamSet | None) -> None:
        self.calls = calls
        self.chosen = chosen
        self.thread = threading.current_thread()
        self.trains: dict[nn.Parameter, bool] = {}  # which of the set's parameters train; those not named do


_OPEN: contextvars.ContextVar[tuple[Block, ...]] = contextvars.ContextVar("parscale_blocks", default=())


@dataclasses.dataclass
class Call:
    """The forward pass under way in this thread, or the last one.

    Args:
        in_flight: the set that it runs with. `None`: the plain backbone.
        trains: the set's parameters, and whether they train; filled where layers are recomputed.
        part: what runs and is mixed: the backbone, or a tower beside it.
        running: itself, or its replica on another device.
        recorder: is shown the keys and values of each attention layer.
        aggregating: whether the streams are mixed.
        masks: what was made of masks for all layers, those with room for the prefix by the id of the mask they extend.
        pooled: what a pooler inside the backbone was given, and its mixture.
        mask_around: the mask `(B, K)` that the module around the backbone was called with, without positions.
        tokens: of `transform="prompt"`: where the tokens stand, `(R, S)`; `None`: everywhere.
        cache: of `transform="prompt"`: the cache of the pass.
        block: the innermost open block, for compiled code, which cannot ask a context variable.
        passes: of the call of the whole model under way, where it has two.
        adaptive: where streams run, for calls that do not run them everywhere.
        one_batch: whether all streams run in one batch, whatever the call.
    """

    in_flight: StreamSet | None = None
    trains: list[tuple[nn.Parameter, bool]] = dataclasses.field(default_factory=list)
    part: Any = None
    running: Any = None
    recorder: Recorder | None = None
    aggregating: bool = True
    masks: dict[Any, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    pooled: tuple[torch.Tensor, torch.Tensor] | None = None
    mask_around: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    cache: Any = None
    block: Block | None = None
    passes: TwoPasses | None = None
    adaptive: Adaptive | None = None
    one_batch: bool = False

    def begin(self, streams: StreamSet | None) -> None:
        """A pass of the backbone, or of the encoder before it, begins with this set."""
        self.masks.clear()
        self.pooled = None
        self.in_flight = streams

    def enter(self, part: Any, running: Any) -> None:
        """A part that is mixed runs: itself, or its replica on another device."""
        self.part, self.running = part, running

    def in_running_part(self, module: Any) -> Any:
        """Of a module of the backbone, the one in the replica that this thread runs; itself where there is none."""
        if self.running is self.part:
            return module
        name = next(name for name, other in self.part.named_modules() if other is module)
        return self.running.get_submodule(name)

    def remembered(self) -> Call:
        """What layers that are recomputed later need to know of this pass."""
        return Call(in_flight=self.in_flight, trains=self.trains, part=self.part, running=self.running)

    @contextlib.contextmanager
    def as_in(self, forward: Call) -> Iterator[None]:
        """In this block layers use the streams of another pass."""
        before = self.in_flight, self.part, self.running
        self.in_flight, self.part, self.running = forward.in_flight, forward.part, forward.running
        try:
            yield
        finally:
            self.in_flight, self.part, self.running = before


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

    @contextlib.contextmanager
    def opened(self, block: Block) -> Iterator[None]:
        """The block, for the caller's thread or task, as long as this one lasts."""
        call = self.call
        around = call.block
        _OPEN.set((*_OPEN.get(), block))
        call.block = block
        try:
            yield
        finally:
            _OPEN.set(tuple(other for other in _OPEN.get() if other is not block))
            call.block = around

    @contextlib.contextmanager
    def choosing(self, streams: StreamSet | None) -> Iterator[None]:
        """Calls in this block run with `streams`. Which parameters train stays as it is."""
        with self.opened(Block(self, streams)):
            yield

    @contextlib.contextmanager
    def recording(self, recorder: Recorder) -> Iterator[None]:
        """Calls in this block show `recorder` the keys and values of each attention layer."""
        call = self.call
        before, call.recorder = call.recorder, recorder
        try:
            yield
        finally:
            call.recorder = before

    @contextlib.contextmanager
    def unmixed(self) -> Iterator[None]:
        """Calls in this block give the final hidden states of all streams, `(P*B, S, H)`."""
        call = self.call
        before, call.aggregating = call.aggregating, False
        try:
            yield
        finally:
            call.aggregating = before

    @contextlib.contextmanager
    def adapting(self, adaptive: Adaptive) -> Iterator[None]:
        """Calls in this block run streams 1 to P - 1 where the entropy of stream 0's prediction is above a threshold.

        Args:
            adaptive: holds the threshold, and counts.
        """
        call = self.call
        before, call.adaptive = call.adaptive, adaptive
        try:
            yield
        finally:
            call.adaptive = before

    @contextlib.contextmanager
    def in_one_batch(self) -> Iterator[None]:
        """Calls in this block run all streams in one batch of P*B rows."""
        call = self.call
        before, call.one_batch = call.one_batch, True
        try:
            yield
        finally:
            call.one_batch = before


def innermost_block(calls: Calls) -> Block | None:
    """The innermost block around the caller that chose a set for the model of these calls."""
    if torch.compiler.is_compiling():
        return calls.call.block
    return next((block for block in reversed(_OPEN.get()) if block.calls is calls), None)


class Blocks(_NotCopied):
    """The open blocks of a model that decide which parameters train; see `parscale.streams.trainability`."""

    def __init__(self) -> None:
        self.innermost: list[Block] = []  # of each thread or task
        self.trained_outside: dict[nn.Parameter, bool] | None = None  # while there are any: what trains without them
        self.used_outside = False  # while there are any: whether a pass outside of them was differentiated
        self.trainers: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # threads with such passes, now or before
