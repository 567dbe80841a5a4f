"""Fits a law to runs: least Huber loss of log loss, from a grid of starting points."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral

import numpy as np
from numpy.typing import ArrayLike

from parscale.scaling_laws.arguments import require_known
from parscale.scaling_laws.data import Array, Points, check_points, positive, size_groups
from parscale.scaling_laws.forms import FORMS, Form
from parscale.scaling_laws.intervals import Interval, Optimum, bootstrap, calibrated_limits, f_limits, profile
from parscale.scaling_laws.law import ParallelScalingLaw
from parscale.scaling_laws.solve import Problem, solve

LEVEL = 0.9
"""Coverage of the intervals."""


@dataclass(frozen=True)
class Fit:
    """A form with fitted parameters."""

    form: Form
    """The form: the loss as a function of N, P and tokens."""
    values: dict[str, float]
    """The parameters by name."""
    r2: float
    """R²: the share of the losses' variance that the fit explains."""
    huber: float
    """Summed Huber loss of log loss."""
    intervals: dict[str, Interval] | None
    """90 % interval of each parameter, a profile with the limits of `calibrated_limits`; None without a bootstrap."""
    draws: Array | None = field(repr=False)
    """`(bootstrap, p)` parameters of each draw, in the form's order; None without a bootstrap."""
    notes: tuple[str, ...]
    """What the runs leave undetermined, as sentences."""
    optimum: Optimum = field(repr=False)
    """The problem that was solved, used by `profile_intervals`."""

    def predict(self, params: ArrayLike, streams: ArrayLike, tokens: ArrayLike | None = None) -> Array:
        """Predicts the loss of runs.

        Args:
            params: N of each run.
            streams: P of each run.
            tokens: training tokens of each run, for a form with a term in tokens.

        Returns:
            `(n,)`, nats per token.

        Raises:
            ValueError: the form needs tokens.
        """
        columns = [np.ravel(np.asarray(params, dtype=np.float64))]
        if self.form.uses_tokens:
            if tokens is None:
                raise ValueError(f"the form {self.form.name!r} predicts from training tokens too; give tokens")
            columns.append(np.ravel(np.asarray(tokens, dtype=np.float64)))
        count, *columns = np.broadcast_arrays(np.ravel(np.asarray(streams, dtype=np.float64)), *columns)
        return self.form.predict(self.optimum.theta[None], np.stack(columns, axis=1), count)[0]

    def profile_intervals(self, level: float = LEVEL) -> dict[str, Interval]:
        """Profile-likelihood interval of each parameter, by the limits of the F distribution; see `intervals.profile`.

        Args:
            level: the coverage of an interval, between 0 and 1.

        Returns:
            Both ends, by name of the parameter.
        """
        return profile(self.optimum, f_limits(self.optimum, level))


def fit(
    params: ArrayLike, streams: ArrayLike, losses: ArrayLike, *, bootstrap: int = 0, seed: int = 0
) -> ParallelScalingLaw:
    """Fits `L(N, P) = E + (A / (N * (k*ln P + 1)))**alpha` to finished runs.

    Least sum of Huber losses (delta 1e-3) of log loss, from a grid of starting points, as in arXiv 2505.10475.

    Args:
        params: N of each run, non-embedding parameters including those of the streams.
        streams: P of each run.
        losses: of each run, in nats per token; all three have the same shape.
        bootstrap: number of resampled datasets to refit for `intervals` and `draws`; 1000 take about a second.
        seed: of the resampling, at least 0.

    Returns:
        The law.

    Raises:
        ValueError: the arguments differ in length, a size or a loss is not a positive number, a P is not a whole number
            of at least 1, or a run stands there twice; there are fewer than four runs, or all have the same P (then k
            is undetermined), the same size (then alpha is) or the same loss; or `bootstrap` or `seed` is out of range.
    """
    points = check_points(params, streams, losses)
    result = fit_form("log", *points, bootstrap=bootstrap, seed=seed)
    return ParallelScalingLaw(
        **result.values,
        r2=result.r2,
        huber=result.huber,
        intervals=result.intervals,
        draws=result.draws,
        freedom=result.optimum.degrees_of_freedom if bootstrap else None,
        notes=result.notes,
    )


def fit_form(
    form: str | Form,
    params: ArrayLike,
    streams: ArrayLike,
    losses: ArrayLike,
    tokens: ArrayLike | None = None,
    *,
    bootstrap: int = 0,
    seed: int = 0,
) -> Fit:
    """Fits any form of the law in the same way as `fit`.

    Args:
        form: `"log"` (that of `fit`), `"rho"`, `"power"`, `"dense"`, or with tokens `"joint"` or `"joint-both"`.
        params: as in `fit`.
        streams: as in `fit`.
        losses: as in `fit`.
        tokens: training tokens of each run, for the joint forms.
        bootstrap: as in `fit`.
        seed: as in `fit`.

    Returns:
        The form with its parameters.

    Raises:
        ValueError: as in `fit`, or the form is unknown, or it needs `tokens` that are missing or all equal.
    """
    if isinstance(form, str):
        require_known("form", form, FORMS)
        form = FORMS[form]
    problem = _problem(form, params, streams, losses, tokens)
    if not isinstance(bootstrap, Integral) or bootstrap < 0:
        raise ValueError(f"bootstrap is the number of resampled datasets, 0 for none; got {bootstrap!r}")
    if not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed is {seed!r}; it must be a whole number of at least 0")
    optimum = _solve(problem)
    names = form.parameters
    natural = optimum.natural(optimum.theta)
    draws = intervals = None
    if bootstrap:
        draws, intervals = _resample(optimum, bootstrap, seed)
    errors = problem.losses - np.exp(optimum.fitted)
    spread = ((problem.losses - problem.losses.mean()) ** 2).sum()
    return Fit(
        form=form,
        values=dict(zip(names, natural.tolist(), strict=True)),
        r2=float(1 - (errors**2).sum() / spread) if spread > 0 else float("nan"),
        huber=optimum.value,
        intervals=intervals,
        draws=draws,
        notes=_notes(problem, optimum, intervals),
        optimum=optimum,
    )


def _problem(form: Form, params: ArrayLike, streams: ArrayLike, losses: ArrayLike, tokens: ArrayLike | None) -> Problem:
    if not form.uses_tokens:
        points = check_points(params, streams, losses)
        sizes = points.params[:, None]
    else:
        if tokens is None:
            raise ValueError(
                f"the form {form.name!r} has a term in training tokens; give tokens, one number for each run"
            )
        points = check_points(params, streams, losses, tokens)
        trained = positive("tokens", tokens, "training tokens")
        sizes = np.stack([points.params, trained], axis=1)
        if np.unique(trained).size == 1:
            raise ValueError(
                f"every run was trained on {trained[0]:g} tokens, so what tokens are worth (beta) could be anything; "
                "add runs with other numbers of tokens, or fit a form without tokens"
            )
    _check_identifiable(form, points)
    return Problem(form, sizes, points.streams, points.losses)


def _check_identifiable(form: Form, points: Points) -> None:
    needed = len(form.parameters)
    if points.losses.size < needed:
        raise ValueError(
            f"{points.losses.size} points for {needed} parameters ({', '.join(form.parameters)}): at least {needed} "
            "runs are needed, and more for intervals"
        )
    if form.uses_streams and np.unique(points.streams).size == 1:
        raise ValueError(
            f"all points have P = {points.streams[0]:g}, so what a stream is worth (k) could be anything; add runs "
            'at another P, or fit the form "dense", which has no k'
        )
    if np.ptp(points.losses) == 0:
        raise ValueError(
            f"every run has loss {points.losses[0]:g}, so there is nothing to explain; add runs whose losses differ"
        )
    if max(np.unique(points.params[points.streams == p]).size for p in np.unique(points.streams)) == 1:
        raise ValueError(
            "no P has runs at two sizes, so how fast loss falls with size (alpha) could be anything; add runs of "
            "other sizes at one P"
        )


def _solve(problem: Problem) -> Optimum:
    starts = problem.form.starts(problem.sizes, problem.streams, problem.losses)
    theta, values = solve(problem, starts)
    best = int(np.argmin(values))
    return Optimum(problem, theta[best], float(values[best]))


def _resample(optimum: Optimum, draws: int, seed: int) -> tuple[Array, dict[str, Interval]]:
    resampled = bootstrap(optimum, draws, seed)
    intervals = profile(optimum, calibrated_limits(optimum, resampled, LEVEL))
    return optimum.natural(resampled.theta), intervals


def _notes(problem: Problem, optimum: Optimum, intervals: dict[str, Interval] | None) -> tuple[str, ...]:
    notes = []
    points = Points(problem.sizes[:, 0], problem.streams, problem.losses)
    sizes = np.unique(size_groups(points)).size
    if sizes < 3:
        notes.append(
            f"{sizes} sizes cannot determine E, A and alpha alone: the values depend on the assumed form in P; "
            "add a third size."
        )
    if np.exp(optimum.theta[0]) < 1e-3 * problem.losses.min():
        notes.append("E came out as 0: these runs show no floor; predictions for larger models are a plain power law.")
    values = dict(zip(problem.form.parameters, optimum.theta, strict=True))
    if problem.form.name == "log" and 1 + values["k"] * np.log(problem.streams.max()) < 1e-2:
        notes.append("k came out at its lower limit: at the largest P these runs are worse than the law can express.")
    if not 1e-3 < values["alpha"] < 10:
        notes.append(f"alpha came out as {values['alpha']:.3g}: these runs show no power law in size.")
    for name in ("k", "m", "gamma"):
        low, high = intervals.get(name, (1.0, 1.0)) if intervals else (1.0, 1.0)
        if high < 0:
            notes.append(
                f"The interval of {name} lies below 0: in these runs the streams did worse than as many parameters, "
                "their own counted, in a plain model."
            )
        elif low <= 0:
            notes.append(f"The interval of {name} holds 0: these runs do not show that streams help.")
    return tuple(notes)
