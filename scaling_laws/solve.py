"""Solves the fit: least Huber loss of the logarithm, for many starting points or many resamples at once.

A damped Newton method with exact derivatives. All problems of a batch take their steps together, so a grid of starting
points, the draws of a bootstrap or the points of a profile cost about as much as one problem.

Shapes: S problems, n points, p parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import huber

from parscale.scaling_laws.data import Array
from parscale.scaling_laws.forms import Form

DELTA = 1e-3
"""The limit between the quadratic and the linear part of the Huber loss, in units of log loss (Hoffmann et al., arXiv
2203.15556, and the paper).
"""

CHUNK = 2_000_000
"""The maximum number of elements in the gradients of a batch; larger batches are solved in parts."""


@dataclass(frozen=True)
class Problem:
    """A fit: a form and the points' sizes `(n, 1 or 2)`, streams `(n,)` and losses `(n,)`."""

    form: Form
    sizes: Array
    streams: Array
    losses: Array


def solve(
    problem: Problem,
    starts: Array,
    *,
    log_losses: Array | None = None,
    free: NDArray[np.bool_] | None = None,
    robust_steps: int = 40,
    newton_steps: int = 60,
    tolerance: float = 1e-14,
) -> tuple[Array, Array]:
    """Minimizes from each start: first with a Hessian that is positive everywhere, then with the exact one.

    Args:
        problem: the form and the data.
        starts: `(S, p)`.
        log_losses: `(S, n)`, a separate dataset for each problem (a bootstrap).
        free: `(S, p)` bool, parameters that are fitted (a profile).
        robust_steps: at most, with the first Hessian.
        newton_steps: at most, with the second.
        tolerance: a problem ends with a step that lowers its loss by less than this share of it.

    Returns:
        `theta` `(S, p)` and the summed Huber loss `(S,)`.
    """
    observed = np.log(problem.losses)[None] if log_losses is None else log_losses
    movable = np.ones(starts.shape, dtype=bool) if free is None else free
    observed = np.broadcast_to(observed, (starts.shape[0], problem.streams.size))
    per_problem = problem.streams.size * (len(problem.form.terms) + 1) * starts.shape[1]
    parts = max(1, int(np.ceil(starts.shape[0] * per_problem / CHUNK)))
    thetas, values = [], []
    with np.errstate(all="ignore"):  # a step may overflow; its loss is then infinite, and the step is rejected
        for rows in np.array_split(np.arange(starts.shape[0]), parts):
            batch = _Batch(problem, observed[rows], movable[rows])
            theta, _ = batch.descend(starts[rows], robust_steps, exact=False, tolerance=1e-5)
            theta, value = batch.descend(theta, newton_steps, exact=True, tolerance=tolerance)
            thetas.append(theta)
            values.append(value)
    return np.concatenate(thetas), np.concatenate(values)


@dataclass(frozen=True)
class _Batch:
    """Problems that take their steps together; `observed` is `(S, n)`, `movable` `(S, p)`."""

    problem: Problem
    observed: Array
    movable: NDArray[np.bool_]

    def descend(self, starts: Array, steps: int, *, exact: bool, tolerance: float) -> tuple[Array, Array]:
        """Levenberg's damping: a step that does not lower the loss is rejected and tried again with more damping.

        A problem stops when a step lowers its loss by less than the share `tolerance`, or no step lowers it.
        """
        theta = starts.copy()
        best = self.objective(theta, np.arange(theta.shape[0]))
        damping = np.full(theta.shape[0], 1e-3)
        diagonal = range(theta.shape[1])
        active = np.flatnonzero(np.isfinite(best))
        for _ in range(steps):
            if not active.size:
                break
            gradient, hessian, scale = self.derivatives(theta[active], active, exact=exact)
            held = ~self.movable[active]
            gradient[held] = 0
            hessian[held[:, :, None] | held[:, None, :]] = 0
            scale = np.where(held, 1.0, scale + 1e-300)
            hessian[:, diagonal, diagonal] += np.where(held, 1.0, damping[active, None] * scale)
            trial = theta[active] - _solve_scaled(hessian, gradient, np.sqrt(scale))
            value = self.objective(trial, active)
            lower = value < best[active]
            settled = lower & (best[active] - value <= tolerance * best[active])
            won, lost = active[lower], active[~lower]
            theta[won], best[won] = trial[lower], value[lower]
            damping[won] = np.maximum(damping[won] * 0.1, 1e-14)
            damping[lost] *= 10
            active = active[~settled & (damping[active] < 1e10)]
        return theta, best

    def objective(self, theta: Array, rows: NDArray[np.int64]) -> Array:
        """Summed Huber loss `(S,)`; infinite where `theta` is not a valid law."""
        problem = self.problem
        values, _ = problem.form.log_terms(theta, problem.sizes, problem.streams)
        log_loss, _ = _log_sum_exp(values)
        total = huber(DELTA, log_loss - self.observed[rows]).sum(axis=1)
        return np.where(problem.form.feasible(theta, problem.streams) & np.isfinite(total), total, np.inf)

    def derivatives(self, theta: Array, rows: NDArray[np.int64], *, exact: bool) -> tuple[Array, Array, Array]:
        """Gradient `(S, p)`, Hessian `(S, p, p)` and a positive scale `(S, p)` of the summed Huber loss.

        log L is a log-sum-exp of the terms, with gradient `g = sum_m s_m du_m` for the terms' shares s, and second
        derivative `sum_m s_m (du_m du_m' + d2u_m) - g g'`.
        """
        problem = self.problem
        values, slopes = problem.form.log_terms(theta, problem.sizes, problem.streams)
        log_loss, share = _log_sum_exp(values)
        gradient = (share[:, :, None, :] @ slopes)[:, :, 0]
        residual = log_loss - self.observed[rows]
        outer = DELTA / np.maximum(np.abs(residual), DELTA)  # Huber's weights
        force = residual * outer
        weighted = gradient * outer[:, :, None]
        scale = (weighted * gradient).sum(axis=1)
        total = (force[:, None] @ gradient)[:, 0]
        if not exact:
            return total, weighted.transpose(0, 2, 1) @ gradient, scale
        inner = (np.abs(residual) <= DELTA) - force  # from Huber's second derivative, and from -g g' above
        hessian = (gradient * inner[:, :, None]).transpose(0, 2, 1) @ gradient
        pull = force[:, :, None] * share
        flat = slopes.reshape(theta.shape[0], -1, theta.shape[1])
        hessian += (flat * pull.reshape(theta.shape[0], -1, 1)).transpose(0, 2, 1) @ flat
        hessian += problem.form.curvature(theta, problem.streams, pull)
        return total, hessian, scale


def _log_sum_exp(values: Array) -> tuple[Array, Array]:
    """The logarithm of the sum of the terms, `(S, n)`, and the share of each term, `(S, n, m)`."""
    largest = values[:, :, 0]
    for term in range(1, values.shape[2]):
        largest = np.maximum(largest, values[:, :, term])
    share = np.exp(values - largest[:, :, None])
    total = share[:, :, 0]
    for term in range(1, values.shape[2]):
        total = total + share[:, :, term]
    share /= total[:, :, None]
    return largest + np.log(total), share


def _solve_scaled(hessian: Array, gradient: Array, scale: Array) -> Array:
    """`hessian^-1 gradient`, with rows and columns divided by `scale`; if that is singular, the gradient itself."""
    scaled = hessian / (scale[:, :, None] * scale[:, None, :])
    right = (gradient / scale)[:, :, None]
    try:
        solution = np.linalg.solve(scaled, right)
    except np.linalg.LinAlgError:
        solution = np.linalg.pinv(scaled) @ right
    return solution[:, :, 0] / scale
