"""The streams of each adapter that PEFT has on a wrapped model.

Streams train beside an adapter, and so belong to it, as PEFT's `modules_to_save` do: each adapter has its own copy of
every set, and one more copy, which never trains, is what the sets were before the first adapter came.

What runs: the tensors.

- the first adapter: the set itself, under its own names
- a further adapter: a copy, which starts as the streams in use when it is added
- no adapter, or all switched off: the copy made before the first adapter

A copy is a `StreamSet` with tensors of its own beside those of the set, so that devices,
dtypes and `copy.deepcopy` treat it as any other set. They are parameters where they may train; the copy made before
the first adapter is of buffers, which nothing trains, counts or saves.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from parscale.compat.deepspeed import is_partitioned
from parscale.compat.torch import set_parameter
from parscale.distributed.parallel import reshard, whole
from parscale.integrations.peft.methods import check_method
from parscale.streams.sets import StreamSet
from parscale.streams.state import ParScaleState, tensors_of
from parscale.transforms import make_set

Copies = dict[str, StreamSet]  # by the set's name


class AdapterStreams:
    """Which copy of each set runs, trains and is saved.

    Args:
        state: of the wrapped model, before its first adapter runs.
        first: the name of that adapter. It becomes the active one.
        peft_config: its configuration.
    """

    def __init__(self, state: ParScaleState, first: str, peft_config: Any) -> None:
        self.state = state
        self.configs = {first: peft_config}
        self.active: str | None = None
        self.disabled = False
        self._count = 0
        self._copies: dict[str | None, Copies] = {None: {}, first: {}}  # by adapter; None: without any
        self._trains: dict[str | None, dict[str, list[bool]]] = {}  # of the parameters of the inactive ones
        for streams in state.sets.values():
            self.cover(streams)
        self.active = first

    @property
    def names(self) -> list[str]:
        """The adapters."""
        return [name for name in self._copies if name is not None]

    def in_use(self, streams: StreamSet) -> StreamSet:
        """The copy of a set that runs now. A copy stands for itself."""
        return self._copy_of(None if self.disabled else self.active, streams)

    def of_active(self, streams: StreamSet) -> StreamSet:
        """The copy that trains and is saved, also while adapters are switched off. A copy stands for itself."""
        return self._copy_of(self.active, streams)

    def _copy_of(self, adapter: str | None, streams: StreamSet) -> StreamSet:
        if self.state.sets.get(streams.name) is not streams:
            return streams
        return self._copies[adapter].get(streams.name, streams)

    @contextlib.contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """In this block the copies in use are those of one adapter. What trains stays as it is."""
        before = self.active, self.disabled
        self.active, self.disabled = adapter, False
        try:
            yield
        finally:
            self.active, self.disabled = before

    @contextlib.contextmanager
    def as_before(self) -> Iterator[None]:
        """In this block the copies in use are those made before the first adapter."""
        before, self.disabled = self.disabled, True
        try:
            yield
        finally:
            self.disabled = before

    def cover(self, streams: StreamSet) -> None:
        """Gives a set copies for all adapters; the first one has the set itself.

        Raises:
            ValueError: an adapter does not go with the set.
        """
        if streams.num_streams == 1:
            return
        for peft_config in self.configs.values():
            check_method(peft_config, [streams.config.transform])
        own = next((name for name in self._copies if name is not None), None)
        for adapter, copies in self._copies.items():
            copies[streams.name] = streams if adapter == own else self._copy(streams, trains=adapter is not None)

    def add(self, adapter: str, peft_config: Any) -> None:
        """Gives a new adapter copies of what is in use. It trains as that does, once it is active."""
        if adapter in self._copies:
            return
        self.configs[adapter] = peft_config
        in_use = self._copies[None if self.disabled else self.active]
        self._trains[adapter] = self._flags()
        self._copies[adapter] = {name: self._copy(streams, trains=True) for name, streams in in_use.items()}

    def activate(self, adapter: str | None, *, trains: bool = True) -> None:
        """Makes an adapter's copies the ones that run and train; without `trains`, that run."""
        if adapter not in self._copies:
            return
        reshard(self.state.model)
        if adapter != self.active:
            self._trains[self.active] = self._flags()
            self._set_flags({name: [False] * len(flags) for name, flags in self._flags().items()})
            self.active = adapter
            self._set_flags(self._trains.pop(adapter, {}))
        if not trains:
            self._set_flags({name: [False] * len(flags) for name, flags in self._flags().items()})

    def remove(self, adapter: str) -> None:
        """Removes an adapter's copies; without another active one, the model is as before the first."""
        if adapter not in self._copies:
            return
        if adapter == self.active:
            self.activate(None)
        self._forget(self._copies.pop(adapter))
        self._trains.pop(adapter, None)
        self.configs.pop(adapter)

    def keep(self, adapter: str | None) -> None:
        """Ends with the adapters: the sets get the values of one adapter's copies, and train as the active ones do."""
        flags = self._flags()
        for name, streams in self._copies[adapter].items():
            own = self._tensors(self.state.sets[name])
            for tensor, value, trains in zip(own, self._tensors(streams), flags[name], strict=True):
                if tensor is not value:
                    with torch.no_grad():
                        tensor.copy_(value)
                tensor.requires_grad_(trains)
        self.drop()

    def drop(self) -> None:
        """Removes all copies, and leaves the sets as they are."""
        for copies in self._copies.values():
            self._forget(copies)
        self.state.adapters = None

    def agree(self, adapters: Iterable[str | None]) -> bool:
        """Whether several adapters' copies of the active set have the same values."""
        if self.state.active is None or self.state.active.num_streams == 1:
            return True
        first, *others = [self._copies[adapter][self.state.active.name] for adapter in adapters]
        pairs = [zip(self._tensors(first), self._tensors(other), strict=True) for other in others]
        return all(a is b or torch.equal(a, b) for pair in pairs for a, b in pair)

    def _flags(self) -> dict[str, list[bool]]:
        """Which tensors of the active copies train, by set."""
        copies = self._copies[self.active]
        return {name: [tensor.requires_grad for tensor in self._tensors(streams)] for name, streams in copies.items()}

    def _set_flags(self, flags: Mapping[str, list[bool]]) -> None:
        for name, trains in flags.items():
            for tensor, flag in zip(self._tensors(self._copies[self.active][name]), trains, strict=True):
                tensor.requires_grad_(flag)

    def _tensors(self, streams: StreamSet) -> list[torch.Tensor]:
        """Those of exactly this set or copy."""
        aggregators = [getattr(part, streams.aggregator_name) for part in self.state.mixed]
        own = [tensor for aggregator in aggregators for tensor in tensors_of(aggregator).values()]
        return [*streams.transform.parameters(), *own]

    def _copy(self, streams: StreamSet, *, trains: bool) -> StreamSet:
        """A frozen copy of a set or of a copy: of parameters where it may train later, else of buffers."""
        self._count += 1
        made = make_set(self.state, streams.name, streams.config, self._count)
        for place in streams.transform.places():
            value: torch.Tensor = getattr(place.module, streams.own_name(place.name))
            _register(place.module, made.own_name(place.name), value, trains)
        for part in self.state.mixed:
            aggregator = copy.deepcopy(getattr(part, streams.aggregator_name))
            for module in aggregator.modules():
                for name, value in tensors_of(module, recurse=False).items():
                    delattr(module, name)
                    _register(module, name, value, trains)
            part.add_module(made.aggregator_name, aggregator)
        made.transform.hang()
        return made

    def _forget(self, copies: Copies) -> None:
        for made in copies.values():
            if made.copy:
                made.transform.detach()
                for place in made.transform.places():
                    delattr(place.module, made.own_name(place.name))
                for part in self.state.mixed:
                    delattr(part, made.aggregator_name)


def adapters_on(state: ParScaleState | None) -> AdapterStreams | None:
    """The adapters' streams of a wrapped model that has adapters."""
    adapters = None if state is None else state.adapters
    return adapters if isinstance(adapters, AdapterStreams) else None


def _register(module: nn.Module, name: str, value: torch.Tensor, trains: bool) -> None:
    value = whole(value) if is_partitioned(value) else value.detach().clone()
    if trains:
        set_parameter(module, name, nn.Parameter(value, requires_grad=False))
    else:
        module.register_buffer(name, value, persistent=False)
