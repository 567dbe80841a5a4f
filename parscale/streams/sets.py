"""A set of streams, and the interfaces of transforms and of adapter libraries.

`Transform` and `Adapters` define what the rest of the package may call; `parscale.transforms` and
`parscale.integrations.peft` implement them.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from parscale.config import DEFAULT_SET, SHARED, ParScaleConfig
from parscale.streams.layer_specs import ParameterSpec
from parscale.streams.naming import AGGREGATOR, COPY


class StreamSet:
    """One named set of streams. Its tensors are parameters of the backbone's modules, under their own names.

    Args:
        name: `"default"` keeps the released names; another set adds `@name` to each.
        config: its configuration.
        copy: number of a copy of the set for an adapter; 0 is the set itself.

    Attributes:
        transform: how its streams differ; set by `parscale.transforms.make_set`.
    """

    transform: Transform

    def __init__(self, name: str, config: ParScaleConfig, copy: int = 0) -> None:
        self.name = name
        self.config = config
        self.copy = copy
        self.key_name, self.value_name = self.own_name("prefix_k"), self.own_name("prefix_v")
        self.aggregator_name = self.own_name(AGGREGATOR)

    def own_name(self, released: str) -> str:
        """The set's name for a parameter, or for the aggregator, in the module that holds it."""
        name = released if self.name == DEFAULT_SET else f"{released}@{self.name}"
        return f"{name}{COPY}{self.copy}" if self.copy else name

    @property
    def num_streams(self) -> int:
        """P."""
        return self.config.num_streams

    @property
    def shares_keys(self) -> bool:
        """Whether all streams attend to the keys and values of stream 0, which is the plain backbone."""
        return self.config.kv == SHARED

    @property
    def cache_copies(self) -> int:
        """The number of cache rows for each row of the input."""
        return 1 if self.shares_keys else self.num_streams


class Transform:
    """How the P copies of a row come to differ; one object for each set of streams.

    Args:
        streams: the set.
    """

    def __init__(self, streams: StreamSet) -> None:
        self.streams = streams

    def parameter_specs(self) -> list[ParameterSpec]:
        """Its parameters, each with where it is registered, its name, shape, dtype and device.

        Raises:
            UnsupportedModelError: the model has no place for them.
        """
        raise NotImplementedError

    def add_hooks(self) -> None:
        """Adds the hooks of the transform to the model, once its parameters exist."""

    def detach(self) -> None:
        """Undoes `add_hooks`."""

    def try_out(self) -> None:
        """Tests whether the model runs with the transform, once its hooks are there.

        Raises:
            UnsupportedModelError: it does not.
        """
        raise NotImplementedError

    def longest_text(self) -> int | None:
        """The maximum number of tokens in a text that streams start from; `None`: any number."""
        raise NotImplementedError

    def read(self, texts: torch.Tensor) -> None:
        """Starts each stream from a text.

        Args:
            texts: token ids `(P, T)`, or `(P - 1, T)` with shared keys and values, on the device of the model's input.
        """
        raise NotImplementedError

    def draw(self, std: float) -> None:
        """Starts the streams at random, from torch's global state.

        Args:
            std: of the backbone's own initialization.
        """
        for parameter in self.parameters():
            parameter.normal_(0.0, std)

    def tensors(self) -> dict[str, nn.Parameter]:
        """Its parameters by their names in a checkpoint, in the order of `parameter_specs`."""
        return {
            spec.released_name: getattr(spec.module, self.streams.own_name(spec.name))
            for spec in self.parameter_specs()
        }

    def parameters(self) -> list[nn.Parameter]:
        """Its parameters, in the order of `parameter_specs`."""
        return list(self.tensors().values())

    def before(self, part: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """Changes the arguments of the backbone or its encoder, which have P*B rows, before the forward."""
        return arguments

    def before_alone(self, part: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """The same in a pass of stream 0 alone, with B rows."""
        return arguments

    def before_pooling(self, states: torch.Tensor) -> torch.Tensor:
        """Changes the final hidden states `(P*B, S, H)` before a pooler inside the backbone."""
        return states

    def after(self, output: Any) -> Any:
        """Changes the backbone's output, with P*B rows, before the streams are mixed."""
        return output


class Adapters(Protocol):
    """The copies of each set that belong to adapters on the model."""

    def in_use(self, streams: StreamSet) -> StreamSet:
        """The copy of a set that runs now."""

    def of_active(self, streams: StreamSet) -> StreamSet:
        """The copy that is trained and saved."""

    def cover(self, streams: StreamSet) -> None:
        """Makes the copies of a new set."""

    def drop(self) -> None:
        """Removes all copies, and leaves the sets unchanged."""
