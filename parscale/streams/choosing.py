"""Which set of streams runs and is trained: the choice for the model, or for a block of code.

`set_streams` chooses for the model; `use_streams` for a block, only in its own thread or task
(`parscale.streams.calls`). Both also decide which parameters are trainable (`parscale.streams.trainability`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from parscale.config import FIELDS
from parscale.distributed.parallel import reshard
from parscale.streams.calls import StreamsBlock, innermost_block
from parscale.streams.sets import StreamSet
from parscale.streams.state import ParScaleState
from parscale.streams.trainability import LOCK, decide_what_trains, parameters_of, set_trainable


def set_streams(model: Any, name: str | None) -> None:
    """Chooses the active set of streams; `None` is the plain backbone.

    Only the active set is trainable: the previous one is frozen, the chosen one is unfrozen. A forward pass that ran
    before still gives its gradients to the set that it ran with. Inside a `use_streams` block the choice lasts to the
    end of the block.

    Choose the set before anything is made that takes note of what trains: an optimizer, a Trainer, DDP or accelerate's
    `prepare`. An optimizer would not move a set chosen later, and DDP would not synchronize its gradients; neither says
    so. Also choose it before `load_state_dict`: names of streams without a set's name, as files have them, are loaded
    into the active set.

    Args:
        name: the set's name; `None` for the plain backbone.

    Raises:
        ValueError: there is no set of this name.
    """
    state: ParScaleState = model.parscale
    chosen, block = find_set(state, name), innermost_block(state.calls)
    with LOCK:
        reshard(model)
        if block is not None:
            block.chosen, block.trains = chosen, {}
        else:
            if chosen is not state.selected:
                _note(state, state.selected, False)
                _note(state, chosen, True)
            state.selected = chosen
            _record(state)
        decide_what_trains(state)


@contextlib.contextmanager
def use_streams(model: Any, name: str | None) -> Iterator[Any]:
    """`with model.use_streams(name):` is `set_streams` for a block, only in its thread or task.

    Other threads keep the sets that they use. This includes threads started inside the block, such as the one that
    generates for a `TextIteratorStreamer`: open the block in that thread, or start it with
    `contextvars.copy_context().run` (`asyncio.to_thread` does). After the block, the active set and the trainable
    parameters are as before. The configuration records the model's choice, not the block's.

    A compiled model uses the set of the block its *thread* opened last. Inside `asyncio.to_thread`, open a block there.
    Blocks of several tasks that overlap in one thread: call the uncompiled model.

    To train in a block, see `set_streams`: an optimizer made before has to have the set's parameters, and DDP does not
    synchronize the gradients of another set than the one that trained when it was made.

    Args:
        name: the set's name; `None` for the plain backbone.

    Yields:
        The model.

    Raises:
        ValueError: there is no set of this name.
    """
    state: ParScaleState = model.parscale
    block, enclosing = StreamsBlock(state.calls, find_set(state, name)), innermost_block(state.calls)
    with LOCK:
        reshard(model)
        if state.blocks.trained_outside is None:
            state.blocks.trained_outside = state.trainability()
        if enclosing is not None:
            enclosing.trains = {p: p.requires_grad for p in parameters_of(state, enclosing.chosen)}
        _replace(state.blocks.innermost, enclosing, block)
        decide_what_trains(state)
    try:
        with state.calls.opened(block):
            yield model
    finally:
        with LOCK:
            reshard(model)
            _replace(state.blocks.innermost, block, enclosing)
            decide_what_trains(state)
            if not state.blocks.innermost:
                state.blocks.trained_outside, state.blocks.used_outside = None, False


def _replace(blocks: list[StreamsBlock], old: StreamsBlock | None, new: StreamsBlock | None) -> None:
    """Only the innermost block of each context counts."""
    blocks[:] = [block for block in blocks if block is not old and block is not new]
    if new is not None:
        blocks.append(new)


def find_set(state: ParScaleState, name: str | None) -> StreamSet | None:
    """The set of this name; `None` for `None`.

    Raises:
        ValueError: there is no such set.
    """
    if name is None:
        return None
    if not isinstance(name, str) or name not in state.sets:
        raise no_such_set(name, state.sets, ", and None for the plain backbone.")
    return state.sets[name]


def no_such_set(name: object, sets: Iterable[str | None], ending: str, checkpoint: object = None) -> ValueError:
    """The error for a set of streams that does not exist.

    Args:
        name: the set's.
        sets: the names of those that exist.
        ending: of the message: what can be chosen beside them, or how.
        checkpoint: where the set was looked for; by default in the model.
    """
    place = "" if checkpoint is None else f" in {checkpoint}"
    known = ", ".join(map(repr, sets)) or "none"
    return ValueError(f"There is no set of streams {name!r}{place}; there are: {known}{ending}")


def _note(state: ParScaleState, streams: StreamSet | None, trains: bool) -> None:
    """Makes a set trainable or not, while no block is open."""
    for parameter in parameters_of(state, streams):
        if state.blocks.trained_outside is None:
            set_trainable(parameter, trains)
        else:
            state.blocks.trained_outside[parameter] = trains


def _record(state: ParScaleState) -> None:
    """Writes the model's own set into its configuration."""
    if state.selected is None:
        return
    for field in FIELDS:
        state.model.config.__dict__.pop(field, None)
    for field, value in state.selected.config.to_fields().items():
        setattr(state.model.config, field, value)


class NumStreams:
    """`model.num_streams`: P of the active streams; 1 when they are off. Only wrapped models have it.

    The active set depends on the calling thread, so it cannot be a plain attribute of the model.
    """

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        if model is None:
            return self
        state = model.__dict__.get("parscale")
        if state is None:
            raise AttributeError(f"{type(model).__name__} has no streams: parscale.wrap(model) gives it some.")
        return state.num_streams
