"""The best size and number of streams for a budget of training compute, of memory or of latency."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parscale.scaling_laws.configs import Config, read_shape
from parscale.scaling_laws.costs import cost
from parscale.scaling_laws.law import ParallelScalingLaw
from parscale.scaling_laws.shapes import ModelShape

STREAM_COUNTS = (1, 2, 4, 8, 16, 32)
BUDGETS = ("train_flops", "memory_bytes", "seconds")


@dataclass(frozen=True)
class Plan:
    """A size and a number of streams, with predicted loss and cost."""

    params: float
    """N, non-embedding parameters including those of the streams."""
    streams: int
    """P."""
    loss: float
    """Predicted loss, in nats per token."""
    shape: ModelShape
    """The shape of the model: the given one, wider or narrower."""
    costs: dict[str, float]
    """The cost in each kind of budget: FLOPs of training, bytes, and seconds."""


def training_flops(params: float, streams: float, tokens: float) -> float:
    """Operations of training: `6 * N * P * D`, six for each parameter, stream and token, without attention scores."""
    return 6 * params * streams * tokens


def optimal(
    law: ParallelScalingLaw,
    config: Config,
    *,
    train_flops: float | None = None,
    memory_bytes: float | None = None,
    seconds: float | None = None,
    streams: Sequence[int] = STREAM_COUNTS,
    tokens: float = 42e9,
    **workload: Any,
) -> Plan:
    """The lowest predicted loss within budgets, over P and over widths of a model.

    Depth and numbers of heads stay those of the model. The law was fitted for a range of sizes and P; beyond it, the
    result is extrapolation.

    Args:
        law: the law for predictions.
        config: of the model, as in `cost`.
        train_flops: budget of training operations.
        memory_bytes: memory budget of one call of generate.
        seconds: time budget of this call.
        streams: the values of P to choose from.
        tokens: training tokens.
        **workload: of this call, as in `cost`; by default batch size 1 and 256 tokens in and out.

    Returns:
        The best plan.

    Raises:
        ValueError: there is no budget, one is not above 0, or even the narrowest model exceeds it.
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
    """The plan with the lowest predicted loss."""
    return min(plans, key=lambda plan: plan.loss)


def frontier(
    law: ParallelScalingLaw,
    config: Config,
    *,
    train_flops: float | None = None,
    memory_bytes: float | None = None,
    seconds: float | None = None,
    streams: Sequence[int] = STREAM_COUNTS,
    tokens: float = 42e9,
    **workload: Any,
) -> list[Plan]:
    """The widest model within the budgets, for each P that has one.

    Args:
        law: as in `optimal`.
        config: as in `optimal`.
        train_flops: as in `optimal`.
        memory_bytes: as in `optimal`.
        seconds: as in `optimal`.
        streams: as in `optimal`.
        tokens: as in `optimal`.
        **workload: as in `optimal`.

    Returns:
        The plans, in the order of `streams`.

    Raises:
        ValueError: as in `optimal`.
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
    base = read_shape(config)
    work = {"batch_size": 1, "input_length": 256, "output_length": 256} | workload
    plans = []
    for count in streams:

        def costs(shape: ModelShape, count: int = count) -> dict[str, float]:
            generation = cost(shape, num_streams=count, **work)
            training = training_flops(shape.params(count, work.get("kv", "own")), count, tokens)
            return dict(zip(BUDGETS, (training, generation.memory_bytes, generation.seconds), strict=True))

        shape = _widest(base, budgets, costs)
        if shape is not None:
            params = shape.params(count, work.get("kv", "own"))
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
    """The largest scaling of `base` within the budgets; None if there is none.

    Widths range from a hundredth of its own to a hundred times it.
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
