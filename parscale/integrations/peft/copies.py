"""The streams of each PEFT adapter on a wrapped model.

Streams are trained with an adapter, and so belong to it, like PEFT's `modules_to_save`: each adapter has its own copy
of every set. One more copy, which is never trained, holds the sets as they were before the first adapter.

Which tensors run, by adapter:

- the first adapter: the set itself, under its own names
- another adapter: a copy, which starts from the streams in use when it is added
- no adapter, or all disabled: the copy made before the first adapter

A copy is a `StreamSet` with its own tensors next to those of the set, so devices, dtypes and `copy.deepcopy` treat it
as any other set. Its tensors are parameters if they can be trained; the copy made before the first adapter has buffers,
which nothing trains, counts or saves.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from parscale.attention.registered import registered_layers
from parscale.compat.deepspeed import is_partitioned
from parscale.compat.patching import replaced
from parscale.compat.torch import set_parameter
from parscale.distributed.parallel import reshard, whole
from parscale.integrations.peft.methods import AdapterConfig, check_method
from parscale.streams.sets import StreamSet
from parscale.streams.state import ParScaleState, tensors_of
from parscale.transforms import make_set

Copies = dict[str, StreamSet]  # by name of the set


class AdapterStreams:
    """Which copy of each set runs, is trained and is saved.

    Args:
        state: the wrapped model's state, before its first adapter runs.
        first: the name of that adapter, which becomes the active one.
        peft_config: its configuration.
    """

    def __init__(self, state: ParScaleState, first: str, peft_config: AdapterConfig) -> None:
        self.state = state
        self.configs = {first: peft_config}
        self.active: str | None = None
        self.disabled = False
        self._count = 0
        self._copies: dict[str | None, Copies] = {None: {}, first: {}}  # by adapter; None: without any
        self._trains: dict[str | None, dict[str, list[bool]]] = {}  # of inactive copies, for each tensor
        self._trained: dict[str, list[bool]] = {}  # of the copies of the adapter that was active last
        self.rested: dict[str, list[bool]] | None = None  # of the active copies, before inference mode froze them
        for streams in state.sets.values():
            self.cover(streams)
        self.active = first

    @property
    def names(self) -> list[str]:
        """The adapters."""
        return [name for name in self._copies if name is not None]

    def in_use(self, streams: StreamSet) -> StreamSet:
        """The copy of a set that runs now. For a copy, the copy itself."""
        return self._copy_of(None if self.disabled else self.active, streams)

    def of_active(self, streams: StreamSet) -> StreamSet:
        """The copy that is trained and saved, even while adapters are disabled. For a copy, the copy itself."""
        return self._copy_of(self.active, streams)

    def _copy_of(self, adapter: str | None, streams: StreamSet) -> StreamSet:
        if self.state.sets.get(streams.name) is not streams:
            return streams
        return self._copies[adapter].get(streams.name, streams)

    @contextlib.contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """In this block the copies in use are those of one adapter. Which parameters are trainable does not change."""
        with replaced(self, "active", adapter), replaced(self, "disabled", False):
            yield

    def cover(self, streams: StreamSet) -> None:
        """Makes copies of a set for all adapters; the first adapter has the set itself.

        Raises:
            ValueError: an adapter does not support the set.
        """
        if streams.num_streams == 1:
            return
        for peft_config in self.configs.values():
            check_method(peft_config, [streams.config.transform], modules_with_streams(self.state))
        own = next((name for name in self._copies if name is not None), None)
        for adapter, copies in self._copies.items():
            copies[streams.name] = streams if adapter == own else self._copy(streams, trains=adapter is not None)

    def add(self, adapter: str, peft_config: AdapterConfig) -> None:
        """Makes copies of the streams in use for a new adapter. Once active, they are trainable as those are."""
        if adapter in self._copies:
            return
        self.configs[adapter] = peft_config
        in_use = self._copies[None if self.disabled else self.active]
        self._trains[adapter] = self._flags_outside_inference()
        self._copies[adapter] = {name: self._copy(streams, trains=True) for name, streams in in_use.items()}

    def activate(self, adapter: str | None, *, trains: bool = True) -> None:
        """Makes an adapter's copies the ones that run, and with `trains` also the trainable ones.

        Without it they are frozen (PEFT's inference mode), until the adapter is activated again.
        """
        if adapter not in self._copies:
            return
        reshard(self.state.model)
        if adapter != self.active or self.rested is not None:
            before = self._trains[self.active] = self._flags_outside_inference()
            self.rested = None
            if self.active is not None:
                self._trained = before
            self._set_flags({name: [False] * len(flags) for name, flags in before.items()})
            self.active = adapter
            kept, streams = self._trains.pop(adapter, {}), self.state.active
            if adapter is not None and streams is not None and streams.name in before:  # the active set alone trains
                flags = kept.get(streams.name, [])
                trained = self._trained.get(streams.name, before[streams.name])
                self._set_flags({streams.name: flags if any(flags) else trained})
        if not trains:
            self.rested = self._flags()
            self._set_flags({name: [False] * len(flags) for name, flags in self._flags().items()})

    def remove(self, adapter: str) -> None:
        """Removes an adapter's copies; without another active one, the model is as before the first adapter."""
        if adapter not in self._copies:
            return
        if adapter == self.active:
            self.activate(None)
        self._forget(self._copies.pop(adapter))
        self._trains.pop(adapter, None)
        self.configs.pop(adapter)

    def merge_into_sets(self, adapter: str | None) -> None:
        """Ends the use of adapters: the sets get the values of one adapter's copies, trainable as the active ones."""
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
        """Removes all copies, and leaves the sets unchanged."""
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
        """Which tensors of the active copies are trainable, by set."""
        copies = self._copies[self.active]
        return {name: [tensor.requires_grad for tensor in self._tensors(streams)] for name, streams in copies.items()}

    def _flags_outside_inference(self) -> dict[str, list[bool]]:
        """The same as they were before inference mode, with what was made trainable since."""
        now, rested = self._flags(), self.rested or {}
        return {
            name: [flag or before for flag, before in zip(flags, rested.get(name, flags), strict=True)]
            for name, flags in now.items()
        }

    def _set_flags(self, flags: Mapping[str, list[bool]]) -> None:
        for name, trains in flags.items():
            for tensor, flag in zip(self._tensors(self._copies[self.active][name]), trains, strict=True):
                tensor.requires_grad_(flag)

    def _tensors(self, streams: StreamSet) -> list[torch.Tensor]:
        """The tensors of exactly this set or copy."""
        aggregators = [getattr(part, streams.aggregator_name) for part in self.state.mixed]
        own = [tensor for aggregator in aggregators for tensor in tensors_of(aggregator).values()]
        return [*streams.transform.parameters(), *own]

    def _copy(self, streams: StreamSet, *, trains: bool) -> StreamSet:
        """A frozen copy of a set or of a copy: parameters if it may be trained later, otherwise buffers."""
        self._count += 1
        made = make_set(self.state, streams.name, streams.config, self._count)
        for spec in streams.transform.parameter_specs():
            value: torch.Tensor = getattr(spec.module, streams.own_name(spec.name))
            _register(spec.module, made.own_name(spec.name), value, trains)
        for part in self.state.mixed:
            aggregator = copy.deepcopy(getattr(part, streams.aggregator_name))
            for module in aggregator.modules():
                for name, value in tensors_of(module, recurse=False).items():
                    delattr(module, name)
                    _register(module, name, value, trains)
            part.add_module(made.aggregator_name, aggregator)
        made.transform.add_hooks()
        return made

    def _forget(self, copies: Copies) -> None:
        for made in copies.values():
            if made.copy:
                made.transform.detach()
                for spec in made.transform.parameter_specs():
                    delattr(spec.module, made.own_name(spec.name))
                for part in self.state.mixed:
                    delattr(part, made.aggregator_name)


def modules_with_streams(state: ParScaleState) -> list[str]:
    """Names of the modules with tensors or hooks of streams, or whose attention knows the model that they belong to."""
    poolers = (getattr(part, "pooler", None) for part in state.mixed)
    found = {*state.parts, *poolers, *(layer.module for layer in state.layers), *registered_layers(state.backbone)}
    for streams in state.sets.values():
        if streams.num_streams > 1:
            found.update(spec.module for spec in streams.transform.parameter_specs())
            found.update(state.key_projections or {} if streams.shares_keys else {})
    return [name for name, module in state.model.named_modules(remove_duplicate=False) if module in found]


def adapters_on(state: ParScaleState | None) -> AdapterStreams | None:
    """The adapters' streams of a wrapped model; `None` if it has no adapters."""
    adapters = None if state is None else state.adapters
    return adapters if isinstance(adapters, AdapterStreams) else None


def _register(module: nn.Module, name: str, value: torch.Tensor, trains: bool) -> None:
    value = whole(value) if is_partitioned(value) else value.detach().clone()
    if trains:
        set_parameter(module, name, nn.Parameter(value, requires_grad=False))
    else:
        module.register_buffer(name, value, persistent=False)
