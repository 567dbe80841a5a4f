"""The paper's cost comparison: its table, and how much less streams add than a plain model of equal loss."""

from __future__ import annotations

import numpy as np

from parscale.scaling_laws.arguments import require_known
from parscale.scaling_laws.configs import read_shape
from parscale.scaling_laws.costs import cost
from parscale.scaling_laws.data import published
from parscale.scaling_laws.shapes import published_models

LENGTHS = (64, 128, 256, 512)
"""Input lengths, equal to the output lengths, over which the paper averages."""


def average(size: str, streams: int, batch_size: int) -> tuple[float, float]:
    """Memory in bytes and seconds of a published model, as the mean over `LENGTHS`: an entry of the paper's figure."""
    models = published_models()
    require_known("published model", size, models)
    shape = read_shape(models[size])
    costs = [
        cost(
            shape, num_streams=streams, batch_size=batch_size, input_length=length, output_length=length, method="paper"
        )
        for length in LENGTHS
    ]
    return float(np.mean([item.memory_bytes for item in costs])), float(np.mean([item.seconds for item in costs]))


def dense_of_equal_loss(streams: int = 8, size: str = "1.6B", *, batch_size: int = 1) -> tuple[float, float]:
    """Memory in bytes and seconds of a plain model that reaches the loss (Stack) of `size` with `streams` streams.

    Both are interpolated by loss between the two nearest published plain models, at the paper's average over lengths.

    Raises:
        ValueError: the size or P has no published point, or the loss is not between two plain models.
    """
    names = list(published_models())
    points = published("stack")
    if size not in names or streams not in points.streams:
        raise ValueError(
            f"no published point for {size!r} at P = {streams}; sizes are {', '.join(names)}, P is 1, 2, 4 or 8"
        )
    loss = points.losses.reshape(-1, len(names))[np.unique(points.streams).tolist().index(streams), names.index(size)]
    plain = points.losses[points.streams == 1]
    upper = int(np.searchsorted(-plain, -loss))
    if not 0 < upper < len(names):
        raise ValueError(f"loss {loss:g} is not between two published plain models ({plain[-1]:g} to {plain[0]:g})")
    share = (plain[upper - 1] - loss) / (plain[upper - 1] - plain[upper])
    ends = np.array([average(name, 1, batch_size) for name in names[upper - 1 : upper + 1]])
    memory_bytes, duration = (1 - share) * ends[0] + share * ends[1]
    return float(memory_bytes), float(duration)


def increase_ratios(batch_size: int = 1) -> tuple[float, float]:
    """The memory and the time that a plain model adds to "1.6B", divided by what 8 streams add for the same loss.

    The paper reports "22x" and "6x".
    """
    base, wide = (np.array(average("1.6B", streams, batch_size)) for streams in (1, 8))
    dense = np.array(dense_of_equal_loss(8, "1.6B", batch_size=batch_size))
    ratios = (dense - base) / (wide - base)
    return float(ratios[0]), float(ratios[1])
