"""The state of a wrapped model besides its tensors: its parts, attention layers, sets of streams and calls.

It is data only: making a `ParScaleState` changes nothing in the model. The hooks are in `parscale.hooks` and
`parscale.attention`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from parscale.kernels.dispatch import Impl
from parscale.streams.aggregator import TENSORS, Aggregator
from parscale.streams.backbones import argument_names, find_generators, find_parts
from parscale.streams.calls import CallState, OpenBlocks, ThreadCalls, innermost_block
from parscale.streams.layer_specs import AttentionLayer, Hidden, Linear
from parscale.streams.naming import AGGREGATOR
from parscale.streams.sets import Adapters, StreamSet


class ParScaleState:
    """The state that wrapping adds to a model, besides the tensors.

    Args:
        model: the model to wrap.
        kernels: the `impl` of the operations in `parscale.kernels`.

    Attributes:
        backbone: the part that runs on all streams and whose output is mixed.
        encoder: of an encoder-decoder model.
        mixed: the backbone and its towers.
        generators: the model, and the models inside it that can generate text with the backbone, from the outside in.
        backbone_name: its name in the model.
        roots: for each of `mixed`, what its tensors' names begin with.
        positional: for each of `parts`, the names of its arguments in their order.
        layers: the attention layers that can carry a prefix.
        without_layers: why there are none.
        linears: the linear layers that run on whole rows, found when a set asks for them.
        key_projections: the linear layers that make nothing but keys and values, and whether they can be given stream
            0's rows alone; found when a set that shares them asks, `None` before.
        hidden: the final hidden states of each of `mixed`.
        measured: dtypes and devices of the weights when `layers` and `hidden` were measured.
        sets: by name.
        selected: the set that `set_streams` chose for the model; an open `use_streams` block takes precedence; `None`:
            the backbone.
        adapters: the copies of the sets for adapters, while PEFT has some on the model.
        blocks: the open `use_streams` blocks, which decide what trains.
        calls: the state of each thread's calls.
        hooks: what removes the hooks that all sets share.
        made_from: the name of the untrained backbone on the Hub; `None` if unknown.

    Raises:
        UnsupportedModelError: it has no backbone that supports streams.
    """

    def __init__(self, model: Any, kernels: Impl = "auto") -> None:
        self.model = model
        parts = find_parts(model)
        self.backbone, self.encoder = parts.backbone, parts.encoder
        self.mixed = [parts.backbone, *parts.towers]
        self.generators = find_generators(model, parts.backbone)
        names = {module: name for name, module in model.named_modules()}
        self.backbone_name = names[self.backbone]
        self.roots = [f"{names[part]}." if names[part] else "" for part in self.mixed]
        self.positional = {part: argument_names(part) for part in self.parts}
        self.kernels = kernels
        self.layers: list[AttentionLayer] = []
        self.without_layers = ""
        self.linears: list[Linear] = []
        self.key_projections: dict[nn.Module, bool] | None = None
        self.hidden: list[Hidden] = []
        self.measured: list[tuple[torch.dtype, torch.device]] = []
        self.sets: dict[str, StreamSet] = {}
        self.selected: StreamSet | None = None
        self.adapters: Adapters | None = None
        self.blocks = OpenBlocks()
        self.calls = ThreadCalls()
        self.hooks: list[Any] = []
        self.made_from: str | None = None
        ALIVE.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts with the set that is active here."""
        return self.__dict__ | {"selected": self.active}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        """Registers a copy in `ALIVE`, like its original."""
        self.__dict__.update(attributes)
        ALIVE.add(self)

    @property
    def parts(self) -> list[Any]:
        """The encoder, if there is one, the backbone, and the towers."""
        return self.mixed if self.encoder is None else [self.encoder, *self.mixed]

    # -- which set runs

    @property
    def active(self) -> StreamSet | None:
        """The set that a call from here runs with: the innermost block's, else the model's; `None`: the backbone."""
        block = innermost_block(self.calls)
        return self.selected if block is None else block.chosen

    @property
    def num_streams(self) -> int:
        """P of the active set; 1 for the plain backbone. In layers that are computed again, as in their pass."""
        if (recorded := self.call.num_streams) is not None:
            return recorded
        active = self.active
        return 1 if active is None else active.num_streams

    @property
    def call(self) -> CallState:
        """The state of this thread's current call."""
        return self.calls.call

    @property
    def in_flight(self) -> StreamSet | None:
        """The set that the current (or recomputed) pass runs with. `None`: the backbone."""
        return self.call.in_flight

    def in_use(self, streams: StreamSet) -> StreamSet:
        """The set, or the copy of it that PEFT's current adapters use."""
        return streams if self.adapters is None else self.adapters.in_use(streams)

    def of_active_adapter(self, streams: StreamSet) -> StreamSet:
        """The set, or the copy of it that belongs to PEFT's active adapter."""
        return streams if self.adapters is None else self.adapters.of_active(streams)

    # -- where the tensors of a set are

    def tensors(self, streams: StreamSet) -> dict[str, nn.Parameter]:
        """The set's parameters by their released names in the model, whatever the name of the set."""
        return {name: getattr(module, own) for name, (module, own) in self.holders(streams).items()}

    def holders(self, streams: StreamSet) -> dict[str, tuple[nn.Module, str]]:
        """The module and the attribute name of each of the set's parameters, by released name."""
        holders = {}
        if streams.num_streams > 1:
            self._aggregators(self.of_active_adapter(streams))  # raises an error if one was replaced
        for released, _, module, name in self._walk(streams):
            path, _, attribute = name.rpartition(".")
            holders[released] = (module.get_submodule(path), attribute)
        return holders

    def names(self, streams: StreamSet) -> dict[str, str]:
        """The set's names in the model's `state_dict`, by released name; the parameters need not be there yet."""
        return {released: f"{root}{name}" for released, root, _, name in self._walk(streams)}

    def _walk(self, streams: StreamSet) -> Iterator[tuple[str, str, nn.Module, str]]:
        """Each parameter: its released name, what its name in the model begins with, the module there, and the rest."""
        streams = self.of_active_adapter(streams)
        if streams.num_streams == 1:
            return
        for spec in streams.transform.parameter_specs():
            root = f"{spec.module_name}." if spec.module_name else ""
            yield spec.released_name, root, spec.module, streams.own_name(spec.name)
        for root, part in zip(self.roots, self.mixed, strict=True):
            for name in TENSORS:
                yield f"{root}{AGGREGATOR}.{name}", root, part, f"{streams.aggregator_name}.{name}"

    def aggregators(self, streams: StreamSet) -> list[Aggregator]:
        """The aggregators of the set, one for each mixed part."""
        return self._aggregators(self.in_use(streams))

    def aggregator(self, streams: StreamSet) -> Aggregator:
        """The aggregator of the backbone."""
        return self.aggregators(streams)[0]

    def _aggregators(self, streams: StreamSet) -> list[Aggregator]:
        """The aggregators of exactly this set or copy.

        Raises:
            ValueError: one was replaced by another module.
        """
        found = [getattr(part, streams.aggregator_name) for part in self.mixed]
        for root, module in zip(self.roots, found, strict=True):
            if not isinstance(module, Aggregator):
                raise ValueError(
                    f"{root}{streams.aggregator_name} is a {type(module).__name__} in place of the aggregator, whose "
                    "tensors are trained and saved: put the aggregator back, and mix otherwise by a forward hook on it."
                )
        return found

    def trainability(self) -> dict[nn.Parameter, bool]:
        """Whether each parameter of each set is trainable."""
        return {p: p.requires_grad for streams in self.sets.values() for p in self.tensors(streams).values()}


ALIVE: weakref.WeakSet[ParScaleState] = weakref.WeakSet()  # of all models, wrapped or copied


def find_state(model: object) -> ParScaleState | None:
    """The state of a wrapped model, also through adapters around it; `None` for anything else."""
    state = getattr(model, "parscale", None)
    return state if isinstance(state, ParScaleState) else None


def active_streams(model: object) -> StreamSet | None:
    """The set that runs in a wrapped model, also through adapters around it; `None` where none does."""
    state = find_state(model)
    return None if state is None else state.active


def tensors_of(module: nn.Module, *, recurse: bool = True) -> dict[str, Any]:
    """A module's parameters by name, and its buffers, which a copy that is never trained has instead."""
    return dict(module.named_parameters(recurse=recurse)) | dict(module.named_buffers(recurse=recurse))
