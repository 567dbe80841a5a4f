"""PEFT's per-row arguments, for streams, which run P*B rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from parscale.compat.arguments import NO_ADAPTER, OF_ADAPTERS
from parscale.integrations.peft.copies import adapters_on
from parscale.integrations.peft.lifecycle import Method
from parscale.integrations.peft.methods import method_of
from parscale.streams.state import ParScaleState, find_state


def get_prompt(original: Method, self: Any, batch_size: int, *args: Any, **kwargs: Any) -> Any:
    """Extends PEFT's method: keys and values get one row per row of the cache, embeddings one per row of the batch."""
    state = find_state(self)
    if state is not None and state.active is not None and method_of(self.active_peft_config).fills_cache:
        batch_size = batch_size * state.active.cache_copies
    return original(self, batch_size, *args, **kwargs)


@contextlib.contextmanager
def with_rows(original: Method, self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Extends PEFT's method: its layers in the backbone get an entry for each of the P*B rows, stream-major."""
    state = find_state(self)
    P = 1 if state is None else state.num_streams
    given = {name: kwargs[name] for name in OF_ADAPTERS if kwargs.get(name) is not None}
    if state is None or P == 1 or not given:
        with original(self, *args, **kwargs):
            yield
        return
    repeated = {name: list(rows) * P for name, rows in given.items()}
    beams = kwargs.get("num_beams") or 1
    outside = {name: [row for row in rows for _ in range(beams)] for name, rows in given.items()}
    streams = _streams_of_rows(state, given.get("adapter_names"))
    around, together = _outside_backbone(state, self, outside), state.calls.in_one_batch()
    with streams, original(self, *args, **kwargs | repeated), around, together:
        yield


@contextlib.contextmanager
def with_tasks(original: Method, self: nn.Module, task_ids: Any) -> Iterator[None]:
    """Extends Poly's method in the same way for the tasks of the rows, `(B,)`."""
    state = find_state(self)
    if task_ids is None or state is None or state.num_streams == 1:
        with original(self, task_ids):
            yield
        return
    repeated = task_ids.repeat(state.num_streams)  # (P*B,)
    with original(self, repeated), _outside_backbone(state, self, {"task_ids": task_ids}), state.calls.in_one_batch():
        yield


def _streams_of_rows(state: ParScaleState, rows: list[str] | None) -> contextlib.AbstractContextManager[None]:
    """The streams of the adapters that the rows of a batch name.

    Raises:
        ValueError: the rows would need different streams.
    """
    adapters = adapters_on(state)
    if rows is None or adapters is None or adapters.disabled:
        return contextlib.nullcontext()
    known = [row for row in dict.fromkeys(rows) if row == NO_ADAPTER or row in adapters.names]
    names = [None if row == NO_ADAPTER else row for row in known]
    if not names:  # PEFT reports it
        return contextlib.nullcontext()
    if not adapters.agree(names):
        raise ValueError(
            f"The adapters {', '.join(map(repr, dict.fromkeys(rows)))} have trained different streams, but all rows of "
            "a batch run with the same: run the rows of each adapter separately, after set_adapter."
        )
    return adapters.using(names[0])


@contextlib.contextmanager
def _outside_backbone(state: ParScaleState, model: nn.Module, given: dict[str, Any]) -> Iterator[None]:
    """Layers outside the backbone, which see B rows, get the original entries."""
    inside = {module for part in state.parts for module in part.modules()}

    def as_given(module: object, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {name: rows for name, rows in given.items() if name in kwargs}

    outside = [module for module in model.modules() if hasattr(module, "base_layer") and module not in inside]
    with contextlib.ExitStack() as hooks:
        for module in outside:
            hooks.enter_context(module.register_forward_pre_hook(as_given, with_kwargs=True))
        yield
