"""ParScale compared with the plain model of equal loss: the cost of each, and where streams stop being cheaper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from parscale.scaling_laws.configs import Config, read_shape
from parscale.scaling_laws.costs import Cost, cost
from parscale.scaling_laws.hardware import Hardware
from parscale.scaling_laws.law import ParallelScalingLaw
from parscale.scaling_laws.shapes import ModelShape

QUANTITIES = ("seconds", "memory_bytes")
AXES = ("batch_size", "input_length", "output_length")
SEARCH_LIMIT = 1 << 20
"""The limit of the search for a crossover."""


@dataclass(frozen=True)
class Comparison:
    """A model with streams and a plain, wider model with the same predicted loss, on one workload."""

    plain: Cost
    """The model without streams."""
    streams: Cost
    """The model with streams."""
    dense: Cost
    """The plain model of equal loss."""

    def ratio(self, quantity: str) -> float:
        """Cost with streams divided by the cost of the dense model; above 1 the streams lose."""
        return float(getattr(self.streams, quantity) / getattr(self.dense, quantity))


def dense_equivalent(law: ParallelScalingLaw, config: Config, num_streams: int, *, kv: str = "own") -> ModelShape:
    """The plain model, of equal depth but wider, with the predicted loss of a model with streams.

    Args:
        law: the law for predictions.
        config: of the model that gets streams, as in `cost`.
        num_streams: P.
        kv: as in `cost`; with `"shared"`, stream 0 has no prefix.

    Returns:
        The wider model's shape.
    """
    shape = read_shape(config)
    return shape.scaled_to(law.equivalent_params(shape.params(num_streams, kv), num_streams))


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
    """The costs of a model without streams, with streams, and of the dense model of equal loss.

    Args:
        law: the law that determines the dense model of equal loss.
        config: as in `cost`.
        num_streams: P.
        batch_size: as in `cost`.
        input_length: as in `cost`.
        output_length: as in `cost`.
        hardware: as in `cost`.
        **options: other arguments of `cost`.

    Returns:
        The three costs.

    Raises:
        FileNotFoundError: as in `cost`.
        ValueError: as in `cost`.
    """
    shape = read_shape(config)
    work: dict[str, Any] = {"batch_size": batch_size, "input_length": input_length, "output_length": output_length}
    work |= {"hardware": hardware, **options}
    with_streams = cost(shape, num_streams=num_streams, **work)  # raises an error for a P below 1
    return Comparison(
        plain=cost(shape, num_streams=1, **work),
        streams=with_streams,
        dense=cost(dense_equivalent(law, shape, num_streams, kv=work.get("kv", "own")), num_streams=1, **work),
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
    """The point from which on streams cost more than the dense model of equal loss.

    They may cost more at some smaller values too, as for a mixture of experts: few rows load few experts, and P streams
    of one token more of them.

    Args:
        law: as in `versus`.
        config: as in `cost`.
        num_streams: P, at least 2.
        quantity: `"seconds"` or `"memory_bytes"`.
        along: the growing quantity: `"batch_size"`, `"input_length"` or `"output_length"`.
        **workload: the other quantities, as in `versus`.

    Returns:
        The value of `along` from which on streams cost more, up to 2^20; None if they are cheaper there.

    Raises:
        ValueError: `quantity` or `along` is invalid, P = 1, or as in `cost`.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"quantity is {quantity!r}; give one of {', '.join(QUANTITIES)}")
    if along not in AXES:
        raise ValueError(f"along is {along!r}; give one of {', '.join(AXES)}")
    if num_streams == 1:
        raise ValueError("with one stream there is nothing to compare; give num_streams of at least 2")
    loses = _loses(law, config, num_streams=num_streams, quantity=quantity, along=along, **workload)
    if not loses(SEARCH_LIMIT):
        return None
    high = SEARCH_LIMIT
    while high > 1 and loses(high // 2):
        high //= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if loses(middle) else (middle, high)
    return high


def loses_below(law: ParallelScalingLaw, config: Config, point: int | None, *, along: str, **options: Any) -> bool:
    """Whether streams cost more than the dense model of equal loss at some power of 2 below a point.

    Args:
        law: as in `versus`.
        config: as in `cost`.
        point: a value of `along`, as `crossover` gives it: None is 2^20.
        along: as in `crossover`.
        **options: the other arguments of `crossover`.
    """
    loses = _loses(law, config, along=along, **options)
    return any(loses(1 << power) for power in range(((point or SEARCH_LIMIT) - 1).bit_length()))


def _loses(
    law: ParallelScalingLaw, config: Config, *, num_streams: int, quantity: str, along: str, **workload: Any
) -> Callable[[int], bool]:
    """Whether streams cost more at a value of `along`, as a function of it."""
    shape = read_shape(config)
    return lambda value: versus(law, shape, num_streams=num_streams, **workload | {along: value}).ratio(quantity) > 1
