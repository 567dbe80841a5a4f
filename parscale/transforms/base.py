"""The common parts of the transforms: they examine the model, and test whether it runs with them."""

from __future__ import annotations

from parscale.errors import UnsupportedModelError
from parscale.streams.brief_runs import is_machine_error, one_line, run_briefly
from parscale.streams.sets import StreamSet, Transform
from parscale.streams.state import ParScaleState

EXACT, FEW_BITS = 1e-3, 5e-2  # tolerances for equal results: in float32, and in shorter formats


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
        """The largest relative difference of results that are equal but for rounding in the model's dtype."""
        return FEW_BITS if self.state.hidden[0].dtype.itemsize < 4 else EXACT

    def attach(self) -> None:
        """Calls `add_hooks`, and tests that the model runs with the transform.

        Raises:
            UnsupportedModelError: it does not.
        """
        super().attach()
        self.try_out()

    def try_out(self) -> None:
        """Tests whether the backbone runs with the streams.

        Raises:
            UnsupportedModelError: it does not.
        """
        try:
            run_briefly(self.state, streams=self.streams)
        except Exception as error:  # whatever the backbone raises for unexpected input
            if isinstance(error, UnsupportedModelError) or is_machine_error(error):
                raise
            raise UnsupportedModelError(
                f"{type(self.state.model).__name__} does not run with transform={self.streams.config.transform!r} "
                f"({type(error).__name__}: {one_line(error)}): use another one."
            ) from error

    def longest_text(self) -> int | None:
        """The number of positions that the configuration names; `None`, any number, if it names none."""
        config = self.state.model.config.get_text_config()
        names = ("max_position_embeddings", "max_target_positions")  # the latter: Whisper
        return next((getattr(config, name) for name in names if getattr(config, name, None)), None)
