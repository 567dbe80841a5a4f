"""The parallel scaling law."""

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

    N: non-embedding parameters, including those of the streams. P: number of streams. L: loss in nats per token.

    `fit` makes a law from runs. With known parameters: `ParallelScalingLaw(E=0.6912, A=1.131e7, alpha=0.1894,
    k=0.3935)`.
    """

    E: float
    """The irreducible loss, in nats per token."""
    A: float
    """The scale, in parameters."""
    alpha: float
    """The exponent of the rest in the size."""
    k: float
    """The worth of a stream: P streams act like `k*ln(P) + 1` times the parameters."""
    r2: float = math.nan
    """R²: the share of the losses' variance that the fit explains."""
    huber: float = math.nan
    """Summed Huber loss (delta 1e-3) of log loss at the optimum."""
    intervals: dict[str, Interval] | None = None
    """90 % intervals of E, A, alpha and k, by the bootstrap; None without one. An undetermined end is infinite."""
    draws: Array | None = field(default=None, repr=False, compare=False)
    """`(bootstrap, 4)`: E, A, alpha, k of each bootstrap draw; None without a bootstrap."""
    freedom: int | None = field(default=None, repr=False, compare=False)
    """Runs less parameters, by which `predict_interval` is wider; None without runs."""
    notes: tuple[str, ...] = ()
    """What the runs leave undetermined, as sentences."""

    def predict(self, params: ArrayLike, streams: ArrayLike) -> Any:
        """Predicts the loss at each size and number of streams.

        Args:
            params: N, non-embedding parameters including those of the streams, above 0.
            streams: P, at least 1. Both broadcast.

        Returns:
            Nats per token; a float for two scalars.

        Raises:
            ValueError: a number is out of range, with k below 0 there are too many streams for the law, or a loss is
                too large for a float.
        """
        size, count = _checked(params, streams)
        with np.errstate(over="ignore", divide="ignore"):
            loss = self.E + (self.A / (size * self._gain(count))) ** self.alpha
        if not np.isfinite(loss).all():
            raise ValueError(
                f"with A = {self.A:g} and alpha = {self.alpha:g} the loss of {float(np.min(size)):g} parameters is too "
                "large for a float; correct the law, or ask for more parameters"
            )
        return loss

    def equivalent_params(self, params: ArrayLike, streams: ArrayLike) -> Any:
        """The parameters of the plain model with the same predicted loss.

        Args:
            params: as in `predict`.
            streams: as in `predict`.

        Returns:
            `N * (k*ln P + 1)`; a float for two scalars.

        Raises:
            ValueError: as in `predict`.
        """
        size, count = _checked(params, streams)
        return size * self._gain(count)

    def params_for(self, loss: float, streams: float = 1) -> float:
        """The predicted size that reaches a loss.

        Args:
            loss: in nats per token, above E.
            streams: P.

        Returns:
            N, non-embedding parameters.

        Raises:
            ValueError: the loss is not above E, or as in `predict`.
        """
        if not loss > self.E:
            raise ValueError(
                f"no size reaches loss {loss:g}: this law's floor is E = {self.E:g}; ask for a loss above it"
            )
        _checked(1, streams)
        return float(self.A * (loss - self.E) ** (-1 / self.alpha) / self._gain(np.float64(streams)))

    def predict_interval(self, params: ArrayLike, streams: ArrayLike, level: float = 0.9) -> tuple[Any, Any]:
        """The bootstrap interval of the predicted loss; a new run has noise of its own in addition.

        Args:
            params: as in `predict`.
            streams: as in `predict`.
            level: the share of draws inside, between 0 and 1.

        Returns:
            Both ends, each as in `predict`.

        Raises:
            ValueError: the law has no bootstrap draws, `level` is out of range, or as in `predict`.
        """
        if self.draws is None:
            raise ValueError("this law has no bootstrap draws to make an interval from; fit it with bootstrap=1000")
        if not 0 < level < 1:
            raise ValueError(f"level is {level!r}; it must be between 0 and 1, such as 0.9")
        size, count = np.broadcast_arrays(*_checked(params, streams))
        floor, scale, exponent, gain = (self.draws[:, [column]] for column in range(4))
        flat, flat_count = size.reshape(1, -1), count.reshape(1, -1)
        left = np.maximum(gain * np.log(flat_count) + 1, 1e-100)  # nearly 0 where a draw's k is far below 0
        losses = floor + (scale / (flat * left)) ** exponent
        low, high = corrected_percentiles(losses, np.asarray(self.predict(flat[0], flat_count[0])), level, self.freedom)
        return low.reshape(size.shape)[()], high.reshape(size.shape)[()]

    def to_dict(self) -> dict[str, Any]:
        """Parameters, quality, intervals (None for an infinite end) and notes, in types that JSON supports."""
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
        """The law from the result of `to_dict`.

        Args:
            contents: the dictionary.

        Returns:
            The law, without bootstrap draws.

        Raises:
            ValueError: E, A, alpha or k is missing, not a finite number or out of range, or `contents` is not from
                `to_dict`.
        """
        values: dict[str, Any] = {name: contents.get(name) for name in ("E", "A", "alpha", "k")}
        for name, value in values.items():
            if not _is_number(value):
                raise ValueError(f"a law has numbers for E, A, alpha and k; {name} is {value!r}")
        if values["E"] < 0:
            raise ValueError(f"E of a law, a loss, is at least 0, got {values['E']:g}")
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

    def _gain(self, streams: ArrayLike) -> Any:
        """The factor by which P streams multiply the parameters; raises `ValueError` if it is not above 0."""
        gain = self.k * np.log(streams) + 1
        if not (gain > 0).all():
            worst = float(np.max(streams))
            raise ValueError(
                f"this law has k = {self.k:g}, with which {worst:g} streams make the effective size 0 or less "
                f"(k*ln P + 1 = {self.k * math.log(worst) + 1:.2g}); ask for P below {math.exp(-1 / self.k):.3g}"
            )
        return gain


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _intervals(contents: object) -> dict[str, Interval] | None:
    """Intervals by name of the parameter, as `to_dict` writes them, with None for an infinite end."""
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
    size, count = _numbers("params", params), _numbers("streams", streams)
    if not (np.isfinite(size) & (size > 0)).all():
        raise ValueError(f"params must be finite and above 0 (non-embedding parameters); got {params!r}")
    if not (np.isfinite(count) & (count >= 1)).all():
        raise ValueError(f"streams must be at least 1, the plain model; got {streams!r}")
    try:
        np.broadcast_shapes(size.shape, count.shape)
    except ValueError:
        raise ValueError(
            f"params of the shape {size.shape} and streams of the shape {count.shape} do not broadcast: give one of "
            "each for every model, or a single one of either"
        ) from None
    return size, count


def _numbers(name: str, values: ArrayLike) -> Array:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers; got {values!r}") from None
