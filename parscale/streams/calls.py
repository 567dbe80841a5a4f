"""The state of a thread's calls of a wrapped model: which set of streams runs, and results of the current pass.

Several threads, or tasks of an event loop, may call one model at once, each with its own set of streams. Two classes
keep them apart:

- `StreamsBlock` is the choice of `with model.use_streams(name):`. A context variable holds the open blocks, so a block
  applies to the code inside it, also in functions that it awaits, and to no other thread or task. Compiled code cannot
  read it, and goes by the thread's blocks.
- `CallState` is what the hooks know of the current call and of its forward pass. Each thread has one, since a pass
  never leaves its thread. Layers that are recomputed in a backward pass may run in another thread, and carry the parts
  that they need.

The context managers of `ThreadCalls` change the state for a block of code, `CallState.begin` for a pass. Hooks store in
it what other hooks of the same pass need.
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

from parscale.compat.patching import replaced
from parscale.streams.passes import Adaptive, TwoPasses
from parscale.streams.sets import StreamSet

Recorder = Callable[[nn.Module, torch.Tensor, torch.Tensor], None]  # layer, keys and values (R, G, K, D)


class StreamsBlock:
    """A block of code in which one model runs with a chosen set of streams.

    Args:
        calls: those of the model; blocks of two models are independent.
        chosen: the set; `None` is the plain backbone.
    """

    def __init__(self, calls: ThreadCalls, chosen: StreamSet | None) -> None:
        self.calls = calls
        self.chosen = chosen
        self.enclosing: StreamsBlock | None = None  # the innermost block around it that this thread has open
        self.thread = threading.current_thread()
        self.trains: dict[nn.Parameter, bool] = {}  # whether the set's parameters are trainable; True if not listed


_OPEN: contextvars.ContextVar[tuple[StreamsBlock, ...]] = contextvars.ContextVar("parscale_blocks", default=())


@dataclasses.dataclass
class CallState:
    """The state of a thread's current call, or of its last one.

    Attributes:
        in_flight: the set that the pass runs with. `None`: the plain backbone, or no pass is running.
        trains: the set's parameters, and whether they are trainable; filled if layers are recomputed.
        part: the mixed part that runs: the backbone, or a tower.
        running: the part itself, or its replica on another device.
        recorder: called with the keys and values of each attention layer.
        aggregating: whether the streams are mixed.
        masks: what was made once for all layers of the pass from a mask or positions (`parscale.attention.masks.once`).
        pooled: the input of a pooler inside the backbone, and its mixture.
        mask_around: the mask `(B, K)` that the module around the backbone was called with, if it was given no
            positions.
        tokens: for `transform="prompt"`: the positions of the tokens, `(R, S)`; `None`: all positions.
        cache: for `transform="prompt"`: the cache of the pass.
        makes_cache: whether the pass was given none, so that a cache in its output is its own.
        routers: P and the number of pieces, if the backbone gave router logits by stream, which the whole model has to
            join.
        open: the blocks that this thread has open, in any of its tasks; the latest is the last.
        block: the latest of them, for compiled code, which cannot read a context variable.
        tangled: whether they overlap: one of them is not inside the one opened before it.
        passes: the two passes of the current call of the whole model, if it has two.
        adaptive: where streams run, for calls that do not run them everywhere.
        one_batch: whether all streams always run in one batch.
        num_streams: of the active set when the pass ran whose layers are computed again; `None` elsewhere.
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
    makes_cache: bool = False
    routers: tuple[int, int] | None = None
    open: list[StreamsBlock] = dataclasses.field(default_factory=list)
    block: StreamsBlock | None = None
    tangled: bool = False
    passes: TwoPasses | None = None
    adaptive: Adaptive | None = None
    one_batch: bool = False
    num_streams: int | None = None

    def begin(self, streams: StreamSet | None) -> None:
        """Starts a pass of the backbone, or of its encoder, with this set."""
        self.masks.clear()
        self.pooled = None
        self.routers = None
        self.in_flight = streams

    def end(self) -> StreamSet | None:
        """Ends the pass: a layer that is called by itself is the plain backbone's. Returns the set that ran.

        Layers that are computed again in the backward pass carry what they need (`for_recomputation`).
        """
        streams, self.in_flight = self.in_flight, None
        return streams

    def hold(self, blocks: list[StreamsBlock]) -> None:
        """Records the blocks that this thread has open."""
        self.open, self.block = blocks, blocks[-1] if blocks else None
        self.tangled = any(
            block.enclosing is not before for before, block in zip([None, *blocks], blocks, strict=False)
        )

    def in_running_part(self, module: Any) -> Any:
        """The module's counterpart in the replica that this thread runs; the module itself without a replica."""
        if self.running is self.part:
            return module
        name = next(name for name, other in self.part.named_modules() if other is module)
        return self.running.get_submodule(name)

    def for_recomputation(self, num_streams: int) -> CallState:
        """A copy of what recomputed layers need to know about this pass.

        Args:
            num_streams: of the active set.
        """
        return CallState(
            in_flight=self.in_flight, trains=self.trains, part=self.part, running=self.running, num_streams=num_streams
        )

    @contextlib.contextmanager
    def using_streams_of(self, forward: CallState) -> Iterator[None]:
        """In this block layers use the streams of another pass."""
        names = ("in_flight", "part", "running", "num_streams")
        before = {name: getattr(self, name) for name in names}
        for name in names:
            setattr(self, name, getattr(forward, name))
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)


class _NotCopied:
    """A base class for objects that belong to running threads: a copy or an unpickled object is new."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return type(self)()


class ThreadCalls(_NotCopied, threading.local):
    """The state of a model's calls, one for each thread."""

    def __init__(self) -> None:
        self.call = CallState()

    @contextlib.contextmanager
    def opened(self, block: StreamsBlock) -> Iterator[None]:
        """Opens a block for the caller's thread or task."""
        call = self.call
        block.enclosing = next((other for other in reversed(_OPEN.get()) if other in call.open), None)
        _OPEN.set((*_OPEN.get(), block))
        call.hold([*call.open, block])
        try:
            yield
        finally:
            _OPEN.set(tuple(other for other in _OPEN.get() if other is not block))
            call.hold([other for other in call.open if other is not block])

    @contextlib.contextmanager
    def choosing(self, streams: StreamSet | None) -> Iterator[None]:
        """Calls in this block run with `streams`. Which parameters are trainable does not change."""
        with self.opened(StreamsBlock(self, streams)):
            yield

    def recording(self, recorder: Recorder) -> contextlib.AbstractContextManager[None]:
        """Calls in this block pass the keys and values of each attention layer to `recorder`."""
        return replaced(self.call, "recorder", recorder)

    def unmixed(self) -> contextlib.AbstractContextManager[None]:
        """Calls in this block return the final hidden states of all streams, `(P*B, S, H)`."""
        return replaced(self.call, "aggregating", False)

    def adapting(self, adaptive: Adaptive) -> contextlib.AbstractContextManager[None]:
        """Calls in this block run streams 1 to P - 1 where the entropy of stream 0's prediction is above a threshold.

        Args:
            adaptive: holds the threshold, and counts.
        """
        return replaced(self.call, "adaptive", adaptive)

    def in_one_batch(self) -> contextlib.AbstractContextManager[None]:
        """Calls in this block run all streams in one batch of P*B rows."""
        return replaced(self.call, "one_batch", True)


def innermost_block(calls: ThreadCalls) -> StreamsBlock | None:
    """The innermost open block that chose a set for the model of these calls.

    Raises:
        ValueError: in compiled code, if blocks of several tasks of this thread are open.
    """
    if torch.compiler.is_compiling():
        if calls.call.tangled:
            raise ValueError(
                "Several tasks of this thread have blocks of use_streams open, which compiled code cannot tell apart. "
                "Call the model that is not compiled, or open one block at a time in each thread."
            )
        return calls.call.block
    return next((block for block in reversed(_OPEN.get()) if block.calls is calls), None)


class OpenBlocks(_NotCopied):
    """The open blocks of a model that decide which parameters are trainable; see `parscale.streams.trainability`."""

    def __init__(self) -> None:
        self.innermost: list[StreamsBlock] = []  # one for each thread or task
        self.trained_outside: dict[nn.Parameter, bool] | None = None  # trainable without the open blocks
        self.used_outside = False  # while blocks are open: whether a pass outside of them recorded gradients
        self.trainers: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # threads with such passes, now or before
