"""Compares forms by their predictions for held-out sizes and held-out P."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from parscale.scaling_laws.data import Array, Points, check_points, size_groups
from parscale.scaling_laws.fitting import fit_form


@dataclass(frozen=True)
class HeldOut:
    """One group of runs, predicted by a fit to all others."""

    group: str
    """Which runs were held out, such as `"P = 8"`."""
    predicted: Array
    """Loss of each of its runs, as predicted from the other runs."""
    actual: Array
    """Loss of each of its runs."""

    @property
    def error(self) -> float:
        """Root mean square of the error in log loss: 0.002 is 0.2 % of loss."""
        return float(np.sqrt(np.mean((np.log(self.predicted) - np.log(self.actual)) ** 2)))


@dataclass(frozen=True)
class Comparison:
    """The result of one form on a set of runs."""

    form: str
    values: dict[str, float]
    """Its parameters, fitted to all runs."""
    r2: float
    huber: float
    size_error: float
    """Root mean square error in log loss, each run predicted without its size; NaN with fewer than three sizes, and
    where the runs of the others determine no fit, as if one size alone has streams."""
    streams_error: float
    """The same without the runs of its P; NaN with fewer than three P, and where the others determine no fit."""


def leave_one_out(
    params: ArrayLike, streams: ArrayLike, losses: ArrayLike, *, by: str, form: str = "log"
) -> list[HeldOut]:
    """Fits a form to all runs except those of one size or one P, and predicts these, for each in turn.

    Args:
        params: as in `fit`.
        streams: as in `fit`.
        losses: as in `fit`.
        by: `"size"` or `"streams"`.
        form: `"log"`, `"rho"`, `"power"` or `"dense"`, as in `fit_form`.

    Returns:
        The held-out groups with their predictions, in order.

    Raises:
        ValueError: `by` is invalid, there are fewer than three groups (the rest would not determine a fit), or as in
            `fit_form`.
    """
    points = check_points(params, streams, losses)
    labels, names = _groups(points, by)
    if len(names) < 3:
        raise ValueError(
            f"holding out one {_NOUNS[by]} of {len(names)} leaves too few for a fit; give runs with at least three"
        )
    result = []
    for label, name in enumerate(names):
        out = labels == label
        fitted = fit_form(form, *(column[~out] for column in points))
        result.append(HeldOut(name, fitted.predict(points.params[out], points.streams[out]), points.losses[out]))
    return result


def compare(
    params: ArrayLike, streams: ArrayLike, losses: ArrayLike, forms: Sequence[str] = ("log", "power", "rho", "dense")
) -> list[Comparison]:
    """Fits forms of the law to the runs and tests each on held-out sizes and held-out P.

    Args:
        params: as in `fit`.
        streams: as in `fit`.
        losses: as in `fit`.
        forms: of `"log"`, `"power"`, `"rho"` and `"dense"`, as in `fit_form`.

    Returns:
        One row for each form, best at held-out P first. An error is NaN where some of the runs determine no fit.

    Raises:
        ValueError: as in `fit_form`, of all runs.
    """
    points = check_points(params, streams, losses)
    result = []
    for name in forms:
        fitted = fit_form(name, *points)
        errors = [_held_out_error(points, by, name) for by in _NOUNS]
        result.append(Comparison(name, fitted.values, fitted.r2, fitted.huber, *errors))
    return sorted(result, key=lambda row: (math.isnan(row.streams_error), row.streams_error))


_NOUNS = {"size": "size", "streams": "P"}


def _held_out_error(points: Points, by: str, form: str) -> float:
    if len(_groups(points, by)[1]) < 3:
        return math.nan
    try:
        groups = leave_one_out(*points, by=by, form=form)
    except ValueError:  # all runs were accepted, so those without a group are not enough
        return math.nan
    squares = np.concatenate([(np.log(group.predicted) - np.log(group.actual)) ** 2 for group in groups])
    return float(np.sqrt(squares.mean()))


def _groups(points: Points, by: str) -> tuple[NDArray[np.int64], list[str]]:
    """The group of each run, and the groups' names."""
    if by == "streams":
        values, labels = np.unique(points.streams, return_inverse=True)
        return labels, [f"P = {value:g}" for value in values]
    if by == "size":
        labels = size_groups(points)
        return labels, [f"N = {points.params[labels == label].min():.4g}" for label in range(labels.max() + 1)]
    raise ValueError(f"by is {by!r}; give 'size' or 'streams'")
