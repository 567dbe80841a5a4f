"""ParScale beside the plain model of equal loss: what each costs, and where the streams stop paying."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from parscale.scaling_laws.configs import read_shape
from parscale.scaling_laws.costs import Config, Cost, cost
from parscale.scaling_laws.hardware import Hardware
from parscale.scaling_laws.law import ParallelScalingLaw
from parscale.scaling_laws.shapes import ModelShape

QUANTITIES = ("seconds", "memory_bytes")
AXES = ("batch_size", "input_length", "output_length")
LARGEST = 1 << 20
"""Where the search for a crossover gives up."""


@dataclass(frozen=True)
class Comparison:
    """A model with streams and a plain, wider one that is predicted to reach the same loss, on one workload."""

    plain: Cost
    """The model without streams."""
    streams: Cost
    """The model with streams."""
    dense: Cost
    """The plain model of equal loss."""

    def ratio(self, quantity: str) -> float:
        """Cost with streams divided by the cost of the dense model; above 1 the streams lose."""
        return float(getattr(self.streams, quantity) / getattr(self.dense, quantity))

    def increase_ratio(self, quantity: str) -> float:
        """How many times more the dense model adds than the streams do: the form of the paper's headline."""
        base = getattr(self.plain, quantity)
        return float((getattr(self.dense, quantity) - base) / (getattr(self.streams, quantity) - base))


def dense_equivalent(law: ParallelScalingLaw, config: Config, num_streams: int) -> ModelShape:
    """The plain model, as deep and wider, that is predicted to have the loss of a model with streams.

    Args:
        law: that predicts.
        config: of the model that gets streams, as `cost` takes it.
        num_streams: P.

    Returns:
        The wider model's shape.
    """
    shape = config if isinstance(config, ModelShape) else read_shape(config)
    return shape.scaled_to(law.equivalent_params(shape.params(num_streams), num_streams))


def versus(
    law: ParallelScalingLaw,
    config: Config,
    *,
    num_streams: int,
    batch_size: int = 1,
    input_length: int = 256,
    output_length: int = 256,
    hardware: str | Hardware = "a100-80gb",
    **options: Any,
) -> Comparison:
    """What a model costs without streams, with them, and what the dense model of equal loss costs.

    Args:
        law: that says which dense model has the same loss.
        config: as `cost`.
        num_streams: P.
        batch_size: as `cost`.
        input_length: as `cost`.
        output_length: as `cost`.
        hardware: as `cost`.
        **options: further arguments of `cost`.

    Returns:
        The three costs.

    Raises:
        FileNotFoundError: as `cost`.
        ValueError: as `cost`.
    """
    shape = config if isinstance(config, ModelShape) else read_shape(config)
    work: dict[str, Any] = {"batch_size": batch_size, "input_length": input_length, "output_length": output_length}
    work |= {"hardware": hardware, **options}
    with_streams = cost(shape, num_streams=num_streams, **work)  # refuses a P below 1 before the law is asked
    return Comparison(
        plain=cost(shape, num_streams=1, **work),
        streams=with_streams,
        dense=cost(dense_equivalent(law, shape, num_streams), num_streams=1, **work),
    )


def crossover(
    law: ParallelScalingLaw,
    config: Config,
    *,
    num_streams: int,
    quantity: str = "seconds",
    along: str = "batch_size",
    **workload: Any,
) -> int | None:
    """From where on the streams cost more than the dense model of equal loss.

    Args:
        law: as `versus`.
        config: as `cost`.
        num_streams: P, at least 2.
        quantity: `"seconds"` or `"memory_bytes"`.
        along: what grows: `"batch_size"`, `"input_length"` or `"output_length"`.
        **workload: the rest, as for `versus`.

    Returns:
        The smallest value of `along`; None if the streams still win at 2^20.

    Raises:
        ValueError: another quantity or axis, P = 1, or as `cost`.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity is {quantity!r}; give one of {', '.join(QUANTITIES)}")
    if along not in AXES:
        raise ValueError(f"along is {along!r}; give one of {', '.join(AXES)}")
    if num_streams == 1:
        raise ValueError("with one stream there is nothing to compare; give num_streams of at least 2")
    shape = config if isinstance(config, ModelShape) else read_shape(config)

    def loses(value: int) -> bool:
        options = workload | {along: value}
        return versus(law, shape, num_streams=num_streams, **options).ratio(quantity) > 1

    high = 1
    while not loses(high):
        high *= 2
        if high > LARGEST:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if loses(middle) else (middle, high)
    return high
