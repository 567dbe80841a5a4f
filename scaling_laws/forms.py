"""The forms of a law: a floor plus one power term for each scaled quantity, and how P enters.

Every form here is `L = E + sum_i C_i`. A term `C = (A / (N * q))**alpha * r` falls with one size N (parameters, or
tokens) and contains the streams in `q` or `r`, which have one parameter, the strength:

| streams | factor | source |
|---|---|---|
| `"log"` | `q = k*ln(P) + 1` | the paper's law, arXiv 2505.10475 |
| `"power"` | `q = P**gamma` | the natural rival: no diminishing returns |
| `"rho"` | `r = ((P-1)*rho + 1) / P` | the paper's theory, rho the correlation of the streams' residuals |

`r` is that theory's `N * P**(1/alpha) * DIVERSITY`, `DIVERSITY = ((P-1)*rho + 1)**(-1/alpha)`, raised to the power
alpha without roots.

Shapes in this file: S sets of parameters side by side, n points, m terms (the floor is term 0), p parameters.
Parameters are held as `theta` (S, p): logarithms of E and of the scales, the others as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from parscale.scaling_laws.data import Array

Effect = Callable[[Array, Array], tuple[Array, Array, Array]]


def _log_effect(k: Array, streams: Array) -> tuple[Array, Array, Array]:
    log_streams = np.log(streams)
    factor = 1 + k * log_streams
    slope = log_streams / factor
    return np.log(factor), slope, -(slope**2)


def _power_effect(gamma: Array, streams: Array) -> tuple[Array, Array, Array]:
    log_streams = np.broadcast_to(np.log(streams), np.broadcast_shapes(gamma.shape, streams.shape))
    return gamma * log_streams, log_streams, np.zeros_like(log_streams)


def _rho_effect(rho: Array, streams: Array) -> tuple[Array, Array, Array]:
    factor = 1 + (streams - 1) * rho
    slope = (streams - 1) / factor
    return np.log(factor / streams), slope, -(slope**2)


EFFECTS: dict[str, Effect] = {"log": _log_effect, "power": _power_effect, "rho": _rho_effect}
"""Logarithm of the streams' factor, with its first and second derivative with respect to the strength."""


@dataclass(frozen=True)
class Term:
    """`(scale / size)**exponent`, with the streams' factor if it has a `strength`."""

    scale: str
    exponent: str
    size: int
    """The size that it depends on: 0 parameters, 1 tokens."""
    effect: str | None = None
    strength: str | None = None


@dataclass(frozen=True)
class Form:
    """The form of a law; its parameters are E and those of its terms, in order."""

    name: str
    equation: str
    terms: tuple[Term, ...]

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters, in the order of `theta`."""
        names = ["E"]
        for term in self.terms:
            names += [term.scale, term.exponent, *([term.strength] if term.strength else [])]
        return tuple(names)

    @cached_property
    def logarithmic(self) -> tuple[bool, ...]:
        """Which parameters are logarithms in `theta`."""
        scales = {"E", *(term.scale for term in self.terms)}
        return tuple(name in scales for name in self.parameters)

    @property
    def uses_tokens(self) -> bool:
        """Whether it has a term in training tokens."""
        return any(term.size == 1 for term in self.terms)

    @property
    def uses_streams(self) -> bool:
        """Whether it depends on P."""
        return any(term.strength for term in self.terms)

    def log_terms(self, theta: Array, sizes: Array, streams: Array) -> tuple[Array, Array]:
        """Logarithm of each term and its gradient: `(S, n, m)` and `(S, n, m, p)`.

        They are not finite if a strength makes a factor 0 or negative.

        Args:
            theta: the parameters of S fits, `(S, p)`.
            sizes: `(n, 1)` or `(n, 2)`, parameters and tokens.
            streams: `(n,)`.
        """
        sets, points = theta.shape[0], streams.size
        values = np.zeros((sets, points, len(self.terms) + 1))
        slopes = np.zeros((*values.shape, theta.shape[1]))
        values[:, :, 0] = theta[:, :1]
        slopes[:, :, 0, 0] = 1
        for row, term in enumerate(self.terms, 1):
            a, b, c = self._columns(term)
            exponent = theta[:, b, None]
            distance = theta[:, a, None] - np.log(sizes[:, term.size])
            if term.effect is not None:
                factor, slope, _ = EFFECTS[term.effect](theta[:, c, None], streams)
                if term.effect == "rho":
                    values[:, :, row] = factor
                    slopes[:, :, row, c] = slope
                else:
                    distance = distance - factor
                    slopes[:, :, row, c] = -exponent * slope
            values[:, :, row] += exponent * distance
            slopes[:, :, row, a] = exponent
            slopes[:, :, row, b] = distance
        return values, slopes

    def curvature(self, theta: Array, streams: Array, weights: Array) -> Array:
        """Second derivatives of the terms' logarithms, summed over points with `weights` (S, n, m): `(S, p, p)`."""
        total = np.zeros((*theta.shape, theta.shape[1]))
        for row, term in enumerate(self.terms, 1):
            a, b, c = self._columns(term)
            weight = weights[:, :, row]
            total[:, a, b] = weight.sum(axis=1)
            total[:, b, a] = total[:, a, b]
            if term.effect is not None:
                _, slope, second = EFFECTS[term.effect](theta[:, c, None], streams)
                if term.effect == "rho":
                    total[:, c, c] = (weight * second).sum(axis=1)
                else:
                    total[:, c, c] = -theta[:, b] * (weight * second).sum(axis=1)
                    total[:, b, c] = -(weight * slope).sum(axis=1)
                    total[:, c, b] = total[:, b, c]
        return total

    def feasible(self, theta: Array, streams: Array) -> NDArray[np.bool_]:
        """Which rows of `theta` are valid laws, `(S,)` bool.

        Their exponents are above 0, their factors are above 0 at the largest P, and nothing overflows.
        """
        good: NDArray[np.bool_] = np.all(np.isfinite(theta) & (np.abs(theta) < 1e4), axis=1)
        largest = streams.max()
        for term in self.terms:
            _, b, c = self._columns(term)
            good &= theta[:, b] > 0
            if term.effect == "log":
                good &= 1 + theta[:, c] * np.log(largest) > 0
            elif term.effect == "rho":
                good &= 1 + theta[:, c] * (largest - 1) > 0
        return good

    def predict(self, theta: Array, sizes: Array, streams: Array) -> Array:
        """Loss `(S, n)` in nats per token."""
        return np.exp(self.log_terms(theta, sizes, streams)[0]).sum(axis=2)

    def starts(self, sizes: Array, streams: Array, losses: Array) -> Array:
        """A grid of starting points `(S, p)` around the data; each fits the mean of the losses minus its floor."""
        floors = (0.2, 0.5, 0.75, 0.9)
        exponents = (0.07, 0.2, 0.5, 1.0)
        strengths = (0.05, 0.5)
        axes = [list(itertools.product(exponents, strengths if term.strength else (0.0,))) for term in self.terms]
        grid: list[list[float]] = []
        for floor, choices in itertools.product(floors, itertools.product(*axes)):
            row = [float(np.log(floor * losses.min()))]
            share = np.log((losses - np.exp(row[0])) / len(self.terms))
            for term, (exponent, strength) in zip(self.terms, choices, strict=True):
                inside = np.log(sizes[:, term.size])
                outside = np.zeros_like(share)
                if term.effect is not None:
                    factor = EFFECTS[term.effect](np.full(1, strength), streams)[0]
                    inside, outside = (inside, factor) if term.effect == "rho" else (inside + factor, outside)
                row += [float(np.mean((share - outside) / exponent + inside)), exponent]
                row += [strength] if term.strength else []
            grid.append(row)
        return np.array(grid)

    def _columns(self, term: Term) -> tuple[int, int, int]:
        find = self.parameters.index
        return find(term.scale), find(term.exponent), find(term.strength) if term.strength else -1


FORMS = {
    form.name: form
    for form in (
        Form("log", "E + (A / (N*(k*ln(P) + 1)))**alpha", (Term("A", "alpha", 0, "log", "k"),)),
        Form("rho", "E + (A/N)**alpha * ((P-1)*rho + 1)/P", (Term("A", "alpha", 0, "rho", "rho"),)),
        Form("power", "E + (A / (N*P**gamma))**alpha", (Term("A", "alpha", 0, "power", "gamma"),)),
        Form("dense", "E + (A/N)**alpha", (Term("A", "alpha", 0),)),
        Form(
            "joint",
            "E + (A / (N*(k*ln(P) + 1)))**alpha + (B/D)**beta",
            (Term("A", "alpha", 0, "log", "k"), Term("B", "beta", 1)),
        ),
        Form(
            "joint-both",
            "E + (A / (N*(k*ln(P) + 1)))**alpha + (B / (D*(m*ln(P) + 1)))**beta",
            (Term("A", "alpha", 0, "log", "k"), Term("B", "beta", 1, "log", "m")),
        ),
    )
}
"""`log`, `rho`, `power` and `dense` (no P) by parameters alone; `joint` and `joint-both` by parameters N and training
tokens D.
"""
