"""A set of streams, what makes its streams differ, and what an adapter library keeps beside it.

`Transform` and `Adapters` say what the rest of the package may ask of the two; `parscale.transforms`
and `parscale.integrations.peft` answer.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from parscale.config import DEFAULT_SET, SHARED, ParScaleConfig
from parscale.streams.naming import COPY
from parscale.streams.places import Place

DEFAULT = DEFAULT_SET


class StreamSet:
    """One named set of streams. Its tensors are parameters of the backbone's modules, under names of its own.

    Args:
        name: `"default"` keeps the released names; another set adds `@name` to each.
        config: its numbers.
        copy: number of a copy of the set that belongs to an adapter; 0 is the set itself.

    Attributes:
        transform: what makes its streams differ; `parscale.transforms.make_set` gives it one.
    """

    transform: Transform

    def __init__(self, name: str, config: ParScaleConfig, copy: int = 0) -> None:
        self.name = name
        self.config = config
        self.copy = copy
        self.key_name, self.value_name = self.own_name("prefix_k"), self.own_name("prefix_v")
        self.aggregator_name = self.own_name("aggregate_layer")

    def own_name(self, released: str) -> str:
        """What the set calls a parameter, or the aggregator, in the module that holds it."""
        name = released if self.name == DEFAULT else f"{released}@{self.name}"
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
        """How many rows a cache has for each row of the input."""
        return 1 if self.shares_keys else self.num_streams


class Transform:
    """How the P copies of a row come to differ. One object for each set of streams.

    Args:
        streams: the set.
    """

    def __init__(self, streams: StreamSet) -> None:
        self.streams = streams

    def places(self) -> list[Place]:
        """Where its parameters live.

        Raises:
            UnsupportedModelError: the model has no place for them.
        """
        raise NotImplementedError

    def hang(self) -> None:
        """Once its parameters exist: what it hangs into the model."""

    def attach(self) -> None:
        """`hang`, and whatever shows that the model runs with it."""
        self.hang()

    def detach(self) -> None:
        """Undoes `hang`."""

    def longest_text(self) -> int | None:
        """How many tokens a text may have that streams start from; `None`: any number."""
        raise NotImplementedError

    def read(self, texts: torch.Tensor) -> None:
        """Starts each stream from a text.

        Args:
            texts: token ids `(P, T)`, on the device of the model's input.
        """
        raise NotImplementedError

    def draw(self, std: float) -> None:
        """Starts the streams at random, from torch's global state.

        Args:
            std: of the backbone's own initialisation.
        """
        for parameter in self.parameters():
            parameter.normal_(0.0, std)

    def tensors(self) -> dict[str, nn.Parameter]:
        """Its parameters by their names in a checkpoint, in the order of `places`."""
        return {
            place.released_name: getattr(place.module, self.streams.own_name(place.name)) for place in self.places()
        }

    def parameters(self) -> list[nn.Parameter]:
        """Its parameters, in the order of `places`."""
        return list(self.tensors().values())

    def before(self, part: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the backbone or of the encoder before it, which have P*B rows, as it shall see them."""
        return arguments

    def before_alone(self, part: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """The same in a pass of stream 0 alone: of B rows."""
        return arguments

    def before_pooling(self, states: torch.Tensor) -> torch.Tensor:
        """The final hidden states `(P*B, S, H)` that a pooler inside the backbone is given, as it shall see them."""
        return states

    def after(self, output: Any) -> Any:
        """The backbone's output, with P*B rows, before the streams are mixed."""
        return output


class Adapters(Protocol):
    """The copies of each set that belong to adapters on the model."""

    def in_use(self, streams: StreamSet) -> StreamSet:
        """The copy of a set that runs now."""

    def of_active(self, streams: StreamSet) -> StreamSet:
        """The copy that trains and is saved."""

    def cover(self, streams: StreamSet) -> None:
        """Gives a new set its copies."""

    def drop(self) -> None:
        """Removes all copies, and leaves the sets as they are."""
