"""The parallel scaling law itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from parscale.scaling_laws.data import Array
from parscale.scaling_laws.intervals import Interval, corrected_percentiles


@dataclass(frozen=True)
class ParallelScalingLaw:
    """`L(N, P) = E + (A / (N * (k*ln P + 1)))**alpha`, arXiv 2505.10475.

    N: non-embedding parameters, those that the streams add included. P: streams. L: nats per token. `fit` makes one
    from runs; one with known parameters is `ParallelScalingLaw(E=0.6912, A=1.131e7, alpha=0.1894, k=0.3935)`.
    """

    E: float
    """Loss that no size removes, nats per token."""
    A: float
    """Scale, in parameters."""
    alpha: float
    """How fast the rest falls with size."""
    k: float
    """What a stream is worth: P streams act like `k*ln(P) + 1` times the parameters."""
    r2: float = math.nan
    """Share of the losses' variance that the fit explains."""
    huber: float = math.nan
    """Summed Huber loss (delta 1e-3) of log loss at the optimum."""
    intervals: dict[str, Interval] | None = None
    """For each of E, A, alpha, k the ends of its 90 % interval, by the bootstrap; None without one. An end that the
    runs do not settle is infinite.
    """
    draws: Array | None = field(default=None, repr=False, compare=False)
    """`(bootstrap, 4)`: E, A, alpha, k of each bootstrap draw; None without one."""
    notes: tuple[str, ...] = ()
    """What these runs do not settle, in sentences."""

    def predict(self, params: ArrayLike, streams: ArrayLike) -> Any:
        """Loss at each size and number of streams.

        Args:
            params: N, non-embedding parameters with those of the streams, above 0.
            streams: P, at least 1. Both broadcast.

        Returns:
            Nats per token; a float for two numbers.

        Raises:
            ValueError: a number is out of range or, with k below 0, there are so many streams that the law ends.
        """
        size, count = _checked(params, streams)
        return self.E + (self.A / (size * self._gain(count))) ** self.alpha

    def equivalent_params(self, params: ArrayLike, streams: ArrayLike) -> Any:
        """Parameters of the plain model with the same predicted loss.

        Args:
            params: as `predict`.
            streams: as `predict`.

        Returns:
            `N * (k*ln P + 1)`; a float for two numbers.

        Raises:
            ValueError: as `predict`.
        """
        size, count = _checked(params, streams)
        return size * self._gain(count)

    def params_for(self, loss: float, streams: float = 1) -> float:
        """The size that is predicted to reach a loss.

        Args:
            loss: in nats per token, above E.
            streams: P.

        Returns:
            N, non-embedding parameters.

        Raises:
            ValueError: the loss is at or below E, or as `predict`.
        """
        if not loss > self.E:
            raise ValueError(
                f"no size reaches loss {loss:g}: this law's floor is E = {self.E:g}; ask for a loss above it"
            )
        _checked(1, streams)
        return float(self.A * (loss - self.E) ** (-1 / self.alpha) / self._gain(np.float64(streams)))

    def predict_interval(self, params: ArrayLike, streams: ArrayLike, level: float = 0.9) -> tuple[Any, Any]:
        """The bootstrap's interval for the predicted loss, not for a new run, whose own noise comes on top.

        Args:
            params: as `predict`.
            streams: as `predict`.
            level: the share of draws inside.

        Returns:
            Both ends, each as `predict`.

        Raises:
            ValueError: the law has no bootstrap draws, or as `predict`.
        """
        if self.draws is None:
            raise ValueError("this law has no bootstrap draws to make an interval from; fit it with bootstrap=1000")
        size, count = np.broadcast_arrays(*_checked(params, streams))
        floor, scale, exponent, gain = (self.draws[:, [column]] for column in range(4))
        flat, flat_count = size.reshape(1, -1), count.reshape(1, -1)
        left = np.maximum(gain * np.log(flat_count) + 1, 1e-100)  # nothing is left where a draw's k is far below 0
        losses = floor + (scale / (flat * left)) ** exponent
        low, high = corrected_percentiles(losses, np.asarray(self.predict(flat[0], flat_count[0])), level)
        return low.reshape(size.shape)[()], high.reshape(size.shape)[()]

    def to_dict(self) -> dict[str, Any]:
        """Parameters, quality, intervals (None for an infinite end) and notes, as JSON can hold them."""
        result: dict[str, Any] = {name: getattr(self, name) for name in ("E", "A", "alpha", "k", "r2", "huber")}
        result = {name: value if math.isfinite(value) else None for name, value in result.items()}
        result["intervals"] = None
        if self.intervals:
            result["intervals"] = {
                name: [end if math.isfinite(end) else None for end in ends] for name, ends in self.intervals.items()
            }
        result["notes"] = list(self.notes)
        return result

    @classmethod
    def from_dict(cls, contents: Mapping[str, Any]) -> ParallelScalingLaw:
        """The law that `to_dict` wrote.

        Args:
            contents: the dictionary.

        Returns:
            The law, without bootstrap draws.

        Raises:
            ValueError: E, A, alpha or k is missing or no finite number, or there is what `to_dict` does not write.
        """
        values: dict[str, Any] = {name: contents.get(name) for name in ("E", "A", "alpha", "k")}
        for name, value in values.items():
            if not _is_number(value):
                raise ValueError(f"a law has numbers for E, A, alpha and k; {name} is {value!r}")
        if not (values["A"] > 0 and values["alpha"] > 0):
            raise ValueError(f"A and alpha of a law are above 0, got {values['A']:g} and {values['alpha']:g}")
        for name in ("r2", "huber"):
            values[name] = contents.get(name)
            if values[name] is None:
                values[name] = math.nan
            elif not _is_number(values[name]):
                raise ValueError(f"{name} of a law is a number or null, got {values[name]!r}")
        values["intervals"] = _intervals(contents.get("intervals"))
        notes = contents.get("notes") or []
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise ValueError(f"the notes of a law are a list of sentences, got {notes!r}")
        return cls(**values, notes=tuple(notes))

    def _gain(self, streams: Any) -> Any:
        """What P streams multiply the parameters by; `ValueError` where that is not above 0."""
        gain = self.k * np.log(streams) + 1
        if not (gain > 0).all():
            worst = float(np.max(streams))
            raise ValueError(
                f"this law has k = {self.k:g}, by which {worst:g} streams leave nothing of a model "
                f"(k*ln P + 1 = {self.k * math.log(worst) + 1:.2g}); ask for P below {math.exp(-1 / self.k):.3g}"
            )
        return gain


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _intervals(contents: Any) -> dict[str, Interval] | None:
    """Intervals by the parameter's name, as `to_dict` writes them, with None for an infinite end."""
    if not contents:
        return None
    if not isinstance(contents, Mapping):
        raise ValueError(f"the intervals of a law are given by its parameters' names, got {contents!r}")
    intervals = {}
    for name, ends in contents.items():
        is_pair = isinstance(ends, list | tuple) and len(ends) == 2
        if not is_pair or not all(end is None or _is_number(end) for end in ends):
            raise ValueError(f"the interval of {name} in a law is two numbers, got {ends!r}")
        low, high = ends
        intervals[name] = (-math.inf if low is None else low, math.inf if high is None else high)
    return intervals


def _checked(params: ArrayLike, streams: ArrayLike) -> tuple[Array, Array]:
    size, count = np.asarray(params, dtype=np.float64), np.asarray(streams, dtype=np.float64)
    if not (np.isfinite(size) & (size > 0)).all():
        raise ValueError(f"params must be finite and above 0 (non-embedding parameters); got {params!r}")
    if not (np.isfinite(count) & (count >= 1)).all():
        raise ValueError(f"streams must be at least 1, the plain model; got {streams!r}")
    return size, count
