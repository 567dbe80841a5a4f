"""What a transform has to do: name its parameters, start them, and act before, in and after the backbone."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from parscale.attention.discovery import has_learned_positions
from parscale.errors import UnsupportedModelError
from parscale.streams.backbones import is_of_the_machine, one_line, run_briefly

if TYPE_CHECKING:
    from parscale.streams.state import ParScaleState, StreamSet


@dataclasses.dataclass
class Place:
    """Where one parameter of a set of streams lives, and what it is like.

    Args:
        path: the module's name in the model.
        module: the module.
        name: of the parameter in it, as in a checkpoint; a set that is not the default one adds its own name.
        shape: P first.
        dtype: of the parameter.
        device: of the parameter.
    """

    path: str
    module: nn.Module
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def released_name(self) -> str:
        """Its name in a checkpoint."""
        return f"{self.path}.{self.name}" if self.path else self.name


class Transform:
    """How the P copies of a row come to differ. One object for each set of streams.

    Args:
        state: of the wrapped model.
        streams: the set.
    """

    def __init__(self, state: ParScaleState, streams: StreamSet) -> None:
        self.state = state
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
        """:meth:`hang`, and whatever shows that the model runs with it."""
        self.hang()

    def try_out(self) -> None:
        """Runs the backbone with the streams, to see whether it can.

        Raises:
            UnsupportedModelError: it cannot.
        """
        try:
            run_briefly(self.state, streams=self.streams)
        except Exception as error:  # whatever the backbone does with what it does not expect
            if isinstance(error, UnsupportedModelError) or is_of_the_machine(error):
                raise
            raise UnsupportedModelError(
                f"{type(self.state.model).__name__} does not run with transform={self.streams.config.transform!r} "
                f"({type(error).__name__}: {one_line(error)}): use another one."
            ) from error

    def detach(self) -> None:
        """Undoes :meth:`hang`."""

    def longest_text(self) -> int | None:
        """How many tokens a text may have that streams start from; ``None``: any number."""
        if not has_learned_positions(self.state.backbone):
            return None
        config = self.state.model.config.get_text_config()
        names = ("max_position_embeddings", "max_target_positions")  # the latter: Whisper
        return next((getattr(config, name) for name in names if getattr(config, name, None)), None)

    def read(self, texts: torch.Tensor) -> None:
        """Starts each stream from a text.

        Args:
            texts: token ids ``(P, T)``, on the device of the model's input.
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
        """Its parameters by their names in a checkpoint, in the order of :meth:`places`."""
        return {
            place.released_name: getattr(place.module, self.streams.own_name(place.name)) for place in self.places()
        }

    def parameters(self) -> list[nn.Parameter]:
        """Its parameters, in the order of :meth:`places`."""
        return list(self.tensors().values())

    def before(self, part: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the backbone or of the encoder before it, which have P*B rows, as it shall see them."""
        return arguments

    def before_pooling(self, states: torch.Tensor) -> torch.Tensor:
        """The final hidden states ``(P*B, S, H)`` that a pooler inside the backbone is given, as it shall see them."""
        return states

    def after(self, output: Any) -> Any:
        """The backbone's output, with P*B rows, before the streams are mixed."""
        return output
