"""The common parts of the transforms: they examine the model, and test whether it runs with them."""

from __future__ import annotations

import torch

from parscale.attention.positions import RowPositions
from parscale.streams.brief_runs import run_briefly, unsupported
from parscale.streams.sets import StreamSet, Transform
from parscale.streams.state import ParScaleState

EXACT, FEW_BITS = 1e-3, 5e-2  # tolerances for equal results: in float32, and in shorter formats


def difference(x: torch.Tensor, y: torch.Tensor) -> float:
    """The largest difference of two tensors, relative to the largest value of the second."""
    return float((x - y).abs().max()) / max(float(y.abs().max()), 1e-30)


class ModelTransform(Transform):
    """A transform of one model.

    Args:
        state: the wrapped model's state.
        streams: the set.
    """

    def __init__(self, state: ParScaleState, streams: StreamSet) -> None:
        super().__init__(streams)
        self.state = state

    @property
    def tolerance(self) -> float:
        """The largest `difference` of results that are equal but for rounding in the model's dtype."""
        return FEW_BITS if self.state.hidden[0].dtype.itemsize < 4 else EXACT

    def try_out(self) -> None:
        """Tests whether the backbone runs with the streams.

        Raises:
            UnsupportedModelError: it does not.
        """
        name, transform = type(self.state.model).__name__, self.streams.config.transform
        with unsupported(f"{name} does not run with transform={transform!r} ({{}}): use another one."):
            run_briefly(self.state, streams=self.streams)

    def longest_text(self) -> int | None:
        """The number of positions that the configuration names; `None`, any number, if it names none."""
        config = self.state.model.config.get_text_config()
        names = ("max_position_embeddings", "max_target_positions")  # the latter: Whisper
        return next((getattr(config, name) for name in names if getattr(config, name, None)), None)


class CountingTransform(ModelTransform):
    """A transform that counts each row's positions from its first real token."""

    def __init__(self, state: ParScaleState, streams: StreamSet) -> None:
        super().__init__(state, streams)
        self._row_positions = RowPositions(state)

    def add_hooks(self) -> None:
        """Hooks the modules around the backbone; those of a set serve its copies too."""
        super().add_hooks()
        if not self.streams.copy:
            self._row_positions.attach()

    def detach(self) -> None:
        """Removes the hooks."""
        super().detach()
        self._row_positions.detach()
