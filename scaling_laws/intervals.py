"""Intervals by profile likelihood, for the batched fit of `solve`.

The limits are those of a seeded bootstrap or of the F distribution.
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
"""Relative tolerance of the Huber loss at optima that affect only the end of an interval."""


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
    def degrees_of_freedom(self) -> int:
        """Points minus parameters; raises `ValueError` if this is 0, since the noise is then unknown."""
        spare = self.problem.losses.size - self.theta.size
        if spare < 1:
            raise ValueError(
                f"{self.problem.losses.size} points for {self.theta.size} parameters leave no way to estimate the "
                "noise: "
                "no interval can be given; add runs, or ask for none (bootstrap 0)"
            )
        return spare

    @property
    def noise(self) -> float:
        """Standard deviation of log loss around the law."""
        return float(np.sqrt((self.residuals**2).sum() / self.degrees_of_freedom))

    def natural(self, theta: Array) -> Array:
        """Parameters `(..., p)` without logarithms."""
        return np.where(self.problem.form.logarithmic, np.exp(np.minimum(theta, 700)), theta)


@dataclass(frozen=True)
class Resampled:
    """B datasets with new noise on a fitted law, each fitted again."""

    log_losses: Array
    """`(B, n)`."""
    theta: Array
    """The parameters of each, `(B, p)`."""
    values: Array
    """The summed Huber loss of each, `(B,)`."""


def bootstrap(optimum: Optimum, draws: int, seed: int) -> Resampled:
    """Refits `draws` datasets with new noise on the fitted law.

    Sizes and P of the runs stay the same and their noise is resampled: a residual with a random sign, scaled for the
    degrees of freedom that the fit used, plus normal noise of the same size. (Resampling whole runs can lose a size or
    a P.) Each draw is solved from the optimum and from some starting points of the grid, and the best solution is kept.
    """
    problem, noise = optimum.problem, optimum.noise
    generator = np.random.default_rng(seed)
    widened = optimum.residuals * np.sqrt(problem.losses.size / optimum.degrees_of_freedom)
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
    """The limits of the likelihood ratio of `profile` for each parameter, `(p,)`.

    They are chosen so that a share `level` of the resampled datasets have their true value, the optimum's, within their
    own interval; they are never below `f_limits`, which is correct for a law that is linear over an interval.

    Percentiles of the draws would miss the truth on one side where the law is curved, as A is along the valley in which
    E, A and alpha trade off; the ratio does not depend on how a parameter is written.
    """
    problem, (draws, number) = optimum.problem, resampled.theta.shape
    fitted = np.log(problem.form.predict(resampled.theta, problem.sizes, problem.streams))
    dispersion = _dispersion(resampled.log_losses - fitted, optimum.degrees_of_freedom)
    limits = np.empty(number)
    for column in range(number):
        free = np.ones((draws, number), dtype=bool)
        free[:, column] = False
        start = np.tile(optimum.theta, (draws, 1))
        _, held = solve(problem, start, log_losses=resampled.log_losses, free=free, tolerance=TOLERANCE)
        limits[column] = np.quantile(2 * (held - resampled.values) / dispersion, level)
    return np.maximum(limits, f_limits(optimum, level))


def corrected_percentiles(
    draws: Array, estimate: Array, level: float, degrees_of_freedom: int | None = None
) -> tuple[Array, Array]:
    """The ends `(p,)` of the bias-corrected percentile interval of `draws` `(B, p)` around `estimate` `(p,)`.

    Efron's correction: if most draws lie on one side of the estimate, the percentiles move to the other side. With
    `degrees_of_freedom`, points minus parameters, they also move outward like Student's t (Hesterberg's expanded
    percentiles, arXiv 1411.5279).
    """
    below = np.clip((draws < estimate).mean(axis=0), 1 / len(draws), 1 - 1 / len(draws))
    shift = 2 * stats.norm.ppf(below)
    reach = (stats.norm if degrees_of_freedom is None else stats.t(degrees_of_freedom)).ppf(0.5 + level / 2)
    ends = [
        np.array([np.quantile(column, q) for column, q in zip(draws.T, stats.norm.cdf(shift + side), strict=True)])
        for side in (-reach, reach)
    ]
    return ends[0], ends[1]


def f_limits(optimum: Optimum, level: float) -> Array:
    """The limits of the F distribution for `profile`, `(p,)`, exact for a linear law with normal noise."""
    return np.full(optimum.theta.size, stats.f.ppf(level, 1, optimum.degrees_of_freedom))


def profile(optimum: Optimum, limits: Array) -> dict[str, Interval]:
    """The profile-likelihood interval of each parameter, `(low, high)`.

    An end that the runs leave undetermined is infinite (0 for E and A).

    A parameter is fixed at more and more distant values while all others are fitted again; the interval ends where the
    Huber loss has risen by more than chance explains. The rise is measured in units of Huber's own dispersion (Schrader
    and Hettmansperger, Biometrika 67, 1980) with normal noise, and compared with `limits` `(p,)`, from `f_limits` or
    `calibrated_limits`.
    """
    form = optimum.problem.form
    spread, ridge = _search_scale(optimum)
    columns = np.repeat(np.arange(len(form.parameters)), 2)
    sides = np.tile([-1.0, 1.0], len(form.parameters))
    reach = sides * spread[columns]
    offsets = np.concatenate([[0.0], np.geomspace(0.25, 200, 16)]) * reach[:, None]
    settled = np.ones(len(columns), dtype=bool)
    for _ in range(4):  # each time, refines the step in which the profile crosses the limit for the last time
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
    """The F statistic for parameter `columns[i]` fixed at each of `offsets[i]` from the optimum, `(len(columns), m)`.

    It is infinite where no law is valid.
    """
    problem, theta = optimum.problem, optimum.theta
    straight = theta + offsets[:, :, None] * ridge[columns][:, None]  # along the ridge, as far as it is linear
    unit = np.eye(theta.size)[columns]
    aside = theta + offsets[:, :, None] * unit[:, None]
    starts = np.concatenate([straight, aside]).reshape(-1, theta.size)
    movable = np.tile(np.repeat(unit == 0, offsets.shape[1], axis=0), (2, 1))
    _, values = solve(problem, starts, free=movable, tolerance=TOLERANCE)
    best = values.reshape(2, *offsets.shape).min(axis=0)
    return 2 * (best - optimum.value) / _dispersion(optimum.residuals, optimum.degrees_of_freedom)


def _dispersion(residuals: Array, degrees_of_freedom: int) -> Any:
    """The unit of twice the rise of the Huber loss, for residuals `(..., n)`.

    It is the mean square of the derivative divided by the mean of the second derivative.
    """
    force = np.clip(residuals, -DELTA, DELTA)
    noise = np.sqrt((residuals**2).sum(axis=-1) / degrees_of_freedom)
    inner = 2 * stats.norm.cdf(DELTA / np.maximum(noise, 1e-300)) - 1
    return np.maximum((force**2).sum(axis=-1) / degrees_of_freedom / inner, 1e-300)


def _search_scale(optimum: Optimum) -> tuple[Array, Array]:
    """The start of the search for an interval's end.

    Returns each parameter's approximate standard error `(p,)`, and how the others change with it, `(p, p)`: from the
    slopes of log loss at the optimum or, where these determine nothing, a step of 1 in this parameter alone.
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
