"""Intervals by profile likelihood, for the batched fit of `solve`.

Their limits are those of a seeded bootstrap or of the F distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from parscale.scaling_laws.data import Array
from parscale.scaling_laws.solve import DELTA, Problem, solve

Interval = tuple[float, float]

TOLERANCE = 1e-8
"""Relative, of the Huber loss at an optimum that only an interval's end depends on."""


@dataclass(frozen=True)
class Optimum:
    """A fitted problem: its parameters `theta` `(p,)` and summed Huber loss."""

    problem: Problem
    theta: Array
    value: float

    @property
    def fitted(self) -> Array:
        """Predicted log loss of each point, `(n,)`."""
        return np.log(self.problem.form.predict(self.theta[None], self.problem.sizes, self.problem.streams)[0])

    @property
    def residuals(self) -> Array:
        """Log loss minus its prediction, `(n,)`."""
        return np.log(self.problem.losses) - self.fitted

    @property
    def freedom(self) -> int:
        """Points minus parameters; `ValueError` when there are none left to measure the noise by."""
        spare = self.problem.losses.size - self.theta.size
        if spare < 1:
            raise ValueError(
                f"{self.problem.losses.size} points for {self.theta.size} parameters leave nothing to measure the "
                "noise by: "
                "no interval can be given; add runs, or ask for none (bootstrap 0)"
            )
        return spare

    @property
    def noise(self) -> float:
        """Standard deviation of log loss around the law."""
        return float(np.sqrt((self.residuals**2).sum() / self.freedom))

    def natural(self, theta: Array) -> Array:
        """Parameters `(..., p)` with the logarithms taken off."""
        return np.where(self.problem.form.logarithmic, np.exp(np.minimum(theta, 700)), theta)


@dataclass(frozen=True)
class Resampled:
    """B data sets with new noise on a fitted law, each fitted again."""

    log_losses: Array
    """`(B, n)`."""
    theta: Array
    """Parameters of each, `(B, p)`."""
    values: Array
    """Summed Huber loss of each, `(B,)`."""


def bootstrap(optimum: Optimum, draws: int, seed: int) -> Resampled:
    """Refits `draws` data sets with new noise on the fitted law.

    The runs stay where they are and their noise is drawn anew: a residual of either sign, widened for the degrees of
    freedom that the fit used up, smoothed with as much normal noise. (Drawing whole runs instead can lose a size or a
    P altogether.) Each draw is solved from the optimum and from some starts of the grid, and the best is kept.
    """
    problem, noise = optimum.problem, optimum.noise
    generator = np.random.default_rng(seed)
    widened = optimum.residuals * np.sqrt(problem.losses.size / optimum.freedom)
    shape = (draws, problem.losses.size)
    resampled = generator.choice(np.concatenate([widened, -widened]), shape)
    log_losses = optimum.fitted + (resampled + generator.normal(0, noise, shape)) / np.sqrt(2)
    grid = problem.form.starts(problem.sizes, problem.streams, problem.losses)
    origins = [optimum.theta, *grid[len(grid) // 8 :: len(grid) // 4]]
    coarse = [solve(problem, np.tile(start, (draws, 1)), log_losses=log_losses, newton_steps=0) for start in origins]
    winner = np.argmin([value for _, value in coarse], axis=0)
    starts = np.stack([theta for theta, _ in coarse])[winner, np.arange(draws)]
    return Resampled(log_losses, *solve(problem, starts, log_losses=log_losses, robust_steps=0, tolerance=TOLERANCE))


def calibrated_limits(optimum: Optimum, resampled: Resampled, level: float) -> Array:
    """How far the likelihood ratio of `profile` may rise for each parameter, `(p,)`.

    So far that a share `level` of the resampled data sets would have their true value, the optimum's, within their own
    interval; never less than `f_limits`, which is right while the law is straight over an interval.

    Percentiles of the draws would miss the truth on one side where the law bends, as A does along the valley in which
    E, A and alpha trade off; the ratio does not care how a parameter is written.
    """
    problem, (draws, number) = optimum.problem, resampled.theta.shape
    fitted = np.log(problem.form.predict(resampled.theta, problem.sizes, problem.streams))
    dispersion = _dispersion(resampled.log_losses - fitted, optimum.freedom)
    limits = np.empty(number)
    for column in range(number):
        free = np.ones((draws, number), dtype=bool)
        free[:, column] = False
        start = np.tile(optimum.theta, (draws, 1))
        _, held = solve(problem, start, log_losses=resampled.log_losses, free=free, tolerance=TOLERANCE)
        limits[column] = np.quantile(2 * (held - resampled.values) / dispersion, level)
    return np.maximum(limits, f_limits(optimum, level))


def corrected_percentiles(
    draws: Array, estimate: Array, level: float, freedom: int | None = None
) -> tuple[Array, Array]:
    """Ends `(p,)` of the bias-corrected percentile interval of `draws` `(B, p)` around `estimate` `(p,)`.

    Efron's correction: where most draws lie to one side of the estimate, the percentiles move the other way. With
    `freedom`, points minus parameters, they also move outward as Student's t does (Hesterberg's expanded percentiles,
    arXiv 1411.5279).
    """
    below = np.clip((draws < estimate).mean(axis=0), 1 / len(draws), 1 - 1 / len(draws))
    shift = 2 * stats.norm.ppf(below)
    reach = (stats.norm if freedom is None else stats.t(freedom)).ppf(0.5 + level / 2)
    ends = [
        np.array([np.quantile(column, q) for column, q in zip(draws.T, stats.norm.cdf(shift + side), strict=True)])
        for side in (-reach, reach)
    ]
    return ends[0], ends[1]


def f_limits(optimum: Optimum, level: float) -> Array:
    """The F distribution's limits for `profile`, `(p,)`, exact for a straight law with normal noise."""
    return np.full(optimum.theta.size, stats.f.ppf(level, 1, optimum.freedom))


def profile(optimum: Optimum, limits: Array) -> dict[str, Interval]:
    """Profile-likelihood interval of each parameter, `(low, high)`.

    An end that the runs do not settle is infinite (0 for E and A).

    A parameter is held at ever more distant values while all others are fitted again; the interval ends where the
    Huber loss has risen by more than chance explains. The rise is measured in units of Huber's own dispersion
    (Schrader and Hettmansperger, Biometrika 67, 1980) with normal noise, and compared with `limits` `(p,)`: of
    `f_limits` or `calibrated_limits`.
    """
    form = optimum.problem.form
    spread, ridge = _search_scale(optimum)
    columns = np.repeat(np.arange(len(form.parameters)), 2)
    sides = np.tile([-1.0, 1.0], len(form.parameters))
    reach = sides * spread[columns]
    offsets = np.concatenate([[0.0], np.geomspace(0.25, 200, 16)]) * reach[:, None]
    settled = np.ones(len(columns), dtype=bool)
    for _ in range(4):  # each time the step in which the profile rises through the limit for the last time, cut finer
        inside = _likelihood_ratio(optimum, columns, offsets, ridge) <= limits[columns, None]
        inside[:, 0] = True
        last = offsets.shape[1] - 1 - np.argmax(inside[:, ::-1], axis=1)
        settled &= last < offsets.shape[1] - 1
        last = np.minimum(last, offsets.shape[1] - 2)
        rows = np.arange(len(columns))
        offsets = np.linspace(offsets[rows, last], offsets[rows, last + 1], 6, axis=1)
    ends = np.where(settled, optimum.theta[columns] + offsets[:, 0], sides * np.inf).reshape(-1, 2)
    with np.errstate(over="ignore"):
        ends = np.where(np.array(form.logarithmic)[:, None], np.exp(ends), ends)
    return {name: (float(low), float(high)) for name, (low, high) in zip(form.parameters, ends, strict=True)}


def _likelihood_ratio(optimum: Optimum, columns: NDArray[np.int64], offsets: Array, ridge: Array) -> Array:
    """F statistic for parameter `columns[i]` held at each of `offsets[i]` from the optimum, `(len(columns), m)`.

    It is infinite where no law is possible.
    """
    problem, theta = optimum.problem, optimum.theta
    straight = theta + offsets[:, :, None] * ridge[columns][:, None]  # along the ridge, as far as it is straight
    unit = np.eye(theta.size)[columns]
    aside = theta + offsets[:, :, None] * unit[:, None]
    starts = np.concatenate([straight, aside]).reshape(-1, theta.size)
    movable = np.tile(np.repeat(unit == 0, offsets.shape[1], axis=0), (2, 1))
    _, values = solve(problem, starts, free=movable, tolerance=TOLERANCE)
    best = values.reshape(2, *offsets.shape).min(axis=0)
    return 2 * (best - optimum.value) / _dispersion(optimum.residuals, optimum.freedom)


def _dispersion(residuals: Array, freedom: int) -> Any:
    """What twice the rise of the Huber loss is measured in, for residuals `(..., n)`.

    The mean square of its derivative over the mean of its second one.
    """
    force = np.clip(residuals, -DELTA, DELTA)
    noise = np.sqrt((residuals**2).sum(axis=-1) / freedom)
    inner = 2 * stats.norm.cdf(DELTA / np.maximum(noise, 1e-300)) - 1
    return np.maximum((force**2).sum(axis=-1) / freedom / inner, 1e-300)


def _search_scale(optimum: Optimum) -> tuple[Array, Array]:
    """Where a search for an interval's end starts.

    Each parameter's approximate standard error `(p,)`, and how the others go with it, `(p, p)`: from the slopes of log
    loss at the optimum, and where these settle nothing, a step of 1 alone.
    """
    problem = optimum.problem
    values, slopes = problem.form.log_terms(optimum.theta[None], problem.sizes, problem.streams)
    shares = np.exp(values - np.logaddexp.reduce(values, axis=2)[:, :, None])
    jacobian = np.einsum("snm,snmp->snp", shares, slopes)[0]
    covariance = np.linalg.pinv(jacobian.T @ jacobian, rcond=1e-14) * max(optimum.noise, 1e-9) ** 2
    variance = np.diag(covariance)
    settled = np.isfinite(variance) & (variance > 1e-24)
    spread = np.sqrt(np.where(settled, variance, 1.0))
    ridge = np.where(settled[:, None], covariance / np.where(settled, variance, 1.0)[:, None], np.eye(variance.size))
    return np.minimum(spread, 10.0), np.clip(ridge, -1e3, 1e3)
