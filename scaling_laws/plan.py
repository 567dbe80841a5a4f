"""The best size and number of streams for a budget of training compute, of memory or of latency."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parscale.scaling_laws.configs import read_shape
from parscale.scaling_laws.costs import Config, cost
from parscale.scaling_laws.law import ParallelScalingLaw
from parscale.scaling_laws.shapes import ModelShape

STREAMS = (1, 2, 4, 8, 16, 32)
BUDGETS = ("train_flops", "memory_bytes", "seconds")


@dataclass(frozen=True)
class Plan:
    """A size and a number of streams, and what they are predicted to bring and to cost."""

    params: float
    """N, non-embedding parameters with those of the streams."""
    streams: int
    """P."""
    loss: float
    """Predicted, nats per token."""
    shape: ModelShape
    """The model: the given one, wider or narrower."""
    costs: dict[str, float]
    """What it takes of each kind of budget."""


def training_flops(params: float, streams: float, tokens: float) -> float:
    """Operations of training: `6 * N * P * D`, six for each parameter, stream and token, without attention's own."""
    return 6 * params * streams * tokens


def optimal_streams_for_compute(k: float) -> float:
    """P that gains most from `N * P` fixed, whatever the rest of the law: 1 for k up to 1, else `exp(1 - 1/k)`.

    With C = N*P the law's effective size is `C * (k*ln P + 1) / P`, whose derivative by P vanishes at `k = k*ln P +
    1`. Both published k are below 1/2: per operation of training, a larger plain model is better, and streams pay in
    memory and latency.
    """
    return 1.0 if k <= 1 else math.exp(1 - 1 / k)


def optimal(
    law: ParallelScalingLaw,
    config: Config,
    *,
    train_flops: float | None = None,
    memory_bytes: float | None = None,
    seconds: float | None = None,
    streams: Sequence[int] = STREAMS,
    tokens: float = 42e9,
    **workload: Any,
) -> Plan:
    """The lowest predicted loss within given budgets, over P and over widths of a model.

    Depth and the numbers of heads stay those of the model. The law was fitted between certain sizes and P; what it says
    beyond them is extrapolation.

    Args:
        law: that predicts.
        config: of the model, as `cost` takes it.
        train_flops: operations that training may take.
        memory_bytes: that one call of generate may take.
        seconds: that it may take.
        streams: the P to choose from.
        tokens: training tokens.
        **workload: of that call, as for `cost`; batch size 1 and 256 tokens in and out unless given.

    Returns:
        The best plan.

    Raises:
        ValueError: there is no budget, one is not above 0, or not even a narrow model keeps it.
    """
    return best(
        frontier(
            law,
            config,
            train_flops=train_flops,
            memory_bytes=memory_bytes,
            seconds=seconds,
            streams=streams,
            tokens=tokens,
            **workload,
        )
    )


def best(plans: Sequence[Plan]) -> Plan:
    """The one with the lowest predicted loss."""
    return min(plans, key=lambda plan: plan.loss)


def frontier(
    law: ParallelScalingLaw,
    config: Config,
    *,
    train_flops: float | None = None,
    memory_bytes: float | None = None,
    seconds: float | None = None,
    streams: Sequence[int] = STREAMS,
    tokens: float = 42e9,
    **workload: Any,
) -> list[Plan]:
    """For each P that can keep the budgets, its widest model that does.

    Args:
        law: as `optimal`.
        config: as `optimal`.
        train_flops: as `optimal`.
        memory_bytes: as `optimal`.
        seconds: as `optimal`.
        streams: as `optimal`.
        tokens: as `optimal`.
        **workload: as `optimal`.

    Returns:
        The plans, in the order of `streams`.

    Raises:
        ValueError: as `optimal`.
    """
    budgets = {
        name: value
        for name, value in zip(BUDGETS, (train_flops, memory_bytes, seconds), strict=True)
        if value is not None
    }
    if not budgets:
        raise ValueError(f"no budget given; give at least one of {', '.join(BUDGETS)}")
    for name, value in (budgets | {"tokens": tokens}).items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value!r}; it must be above 0 and finite")
    base = config if isinstance(config, ModelShape) else read_shape(config)
    work = {"batch_size": 1, "input_length": 256, "output_length": 256} | workload
    plans = []
    for count in streams:

        def costs(shape: ModelShape, count: int = count) -> dict[str, float]:
            generation = cost(shape, num_streams=count, **work)
            training = training_flops(shape.params(count), count, tokens)
            return dict(zip(BUDGETS, (training, generation.memory_bytes, generation.seconds), strict=True))

        shape = _widest(base, budgets, costs)
        if shape is not None:
            params = shape.params(count)
            plans.append(Plan(params, count, law.predict(params, count), shape, costs(shape)))
    if not plans:
        given = ", ".join(f"{name} = {value:g}" for name, value in budgets.items())
        raise ValueError(
            f"no width of this model keeps {given} at any of P = {list(streams)}; give more, or a model of fewer layers"
        )
    return plans


def _widest(
    base: ModelShape, budgets: dict[str, float], costs: Callable[[ModelShape], dict[str, float]]
) -> ModelShape | None:
    """The largest scaling of `base` whose costs keep the budgets; None if none does.

    Widths lie between a hundredth and a hundredfold of its own.
    """

    def keeps(width: float) -> bool:
        taken = costs(base.scaled(width))
        return all(taken[name] <= limit for name, limit in budgets.items())

    low, high = math.log(1e-2), math.log(1e2)
    if not keeps(math.exp(low)):
        return None
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(math.exp(middle)) else (low, middle)
    return base.scaled(float(np.exp(low)))
