"""The published points, and functions that read and check other points."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from parscale.scaling_laws.files import number, read_table

Array = NDArray[np.float64]

CORPORA = ("stack", "pile")
COLUMNS = ("params", "streams", "loss")


class Points(NamedTuple):
    """Final losses of trained models, one entry for each run; each array has the shape `(n,)`."""

    params: Array
    """Non-embedding parameters, including those of the streams."""
    streams: Array
    """P, the number of parallel streams."""
    losses: Array
    """Final loss in nats per token."""


def published(corpus: str) -> Points:
    """The 24 published points of a corpus: six sizes times P = 1, 2, 4, 8, each trained on 42B tokens.

    Source: `parametric_fit.py` of the code released with arXiv 2505.10475.

    Args:
        corpus: `"stack"` (Stack-V2-Python) or `"pile"`.

    Returns:
        Their sizes, P and losses.

    Raises:
        ValueError: the corpus is unknown.
    """
    if corpus not in CORPORA:
        raise ValueError(f"no published corpus {corpus!r}; give one of {', '.join(map(repr, CORPORA))}")
    rows = list(data_rows(f"{corpus}.csv"))
    columns = ([float(row[name]) for row in rows] for name in COLUMNS)
    return Points(*(np.array(column) for column in columns))


def data_rows(name: str) -> Iterator[dict[str, str]]:
    """The rows of a CSV file in the package; lines that start with `#` name its source and are skipped."""
    text = (files(__package__) / "data" / name).read_text(encoding="utf-8")
    yield from csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))


def read_csv(path: str | Path, columns: Sequence[str] = COLUMNS) -> dict[str, Array]:
    """Reads the named columns of a CSV file with a header, as `read_table` does; other columns are skipped.

    Returns one array `(n,)` for each name. Raises `FileNotFoundError` if the file does not exist, and `ValueError`,
    with the line, if a column is missing, a row has more or fewer cells than the header, or an entry is not a finite
    number.
    """
    lines = read_table(path, columns, " (non-embedding parameters, P, nats per token)")
    rows = [[number(cells[name], name, where) for name in columns] for where, cells in lines]
    table = np.array(rows).reshape(len(rows), len(columns))
    return {name: table[:, index] for index, name in enumerate(columns)}


def read_points(path: str | Path) -> Points:
    """Reads runs from a CSV file.

    Args:
        path: a file with the columns `params`, `streams` and `loss`.

    Returns:
        Their sizes, P and losses.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a column is missing or a number is impossible.
    """
    table = read_csv(path)
    return check_points(*(table[name] for name in COLUMNS))


def check_points(params: ArrayLike, streams: ArrayLike, losses: ArrayLike, tokens: ArrayLike | None = None) -> Points:
    """The three arguments as flat float arrays of equal length.

    With `tokens`, a run counts as repeated only if its tokens are also equal. Raises `ValueError`, with the point and
    the allowed values, for different lengths, entries that are not finite numbers, sizes or losses that are not
    positive, a P that is not a whole number of at least 1, and repeated rows.
    """
    points = Points(
        positive("params", params, "non-embedding parameters"),
        positive("streams", streams, "P"),
        positive("losses", losses, "nats per token"),
    )
    columns = dict(zip(points._fields, points, strict=True))
    if tokens is not None:
        columns["tokens"] = positive("tokens", tokens, "training tokens")
    if len({array.size for array in columns.values()}) != 1:
        sizes = ", ".join(f"{array.size} {name}" for name, array in columns.items())
        raise ValueError(f"got {sizes}; give one of each for every run")
    wrong = np.flatnonzero((points.streams < 1) | (points.streams != np.floor(points.streams)))
    if wrong.size:
        raise ValueError(
            f"streams of point {wrong[0] + 1} is {points.streams[wrong[0]]:g}; P is a whole number of streams, 1 for "
            "the plain model"
        )
    no_repeats(np.stack(list(columns.values()), axis=1))
    return points


def positive(name: str, values: ArrayLike, meaning: str) -> Array:
    """`values` as a flat float array; raises `ValueError` for an entry that is not a finite positive number."""
    try:
        array = np.asarray(values, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers ({meaning}); got {values!r}") from None
    wrong = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
    if wrong.size:
        raise ValueError(
            f"{name} of point {wrong[0] + 1} is {array[wrong[0]]:g}; every one must be finite and above 0 ({meaning}): "
            "correct or remove the point"
        )
    return array


def no_repeats(rows: Array) -> None:
    """Raises `ValueError` if two rows of `(n, columns)` are exactly equal."""
    seen: dict[tuple[float, ...], int] = {}
    for index, row in enumerate(map(tuple, rows.tolist())):
        if row in seen:
            raise ValueError(
                f"points {seen[row] + 1} and {index + 1} are the same in every digit "
                f"({', '.join(f'{value:g}' for value in row)}); "
                "a repeated row would count twice: remove one (a repeated run has a different loss)"
            )
        seen[row] = index


def size_groups(points: Points) -> NDArray[np.int64]:
    """The backbone of each point, `(n,)`, 0 for the smallest.

    Streams add parameters, so one backbone has a different size at each P. If every P has the same number of different
    sizes, they are matched by rank; otherwise sizes within 5 % of their neighbour are one backbone.
    """
    by_streams = {streams: np.unique(points.params[points.streams == streams]) for streams in np.unique(points.streams)}
    if len({sizes.size for sizes in by_streams.values()}) == 1:
        ranks = [np.searchsorted(by_streams[p], n) for n, p in zip(points.params, points.streams, strict=True)]
        return np.array(ranks, dtype=np.int64)
    order = np.argsort(points.params, kind="stable")
    steps = np.diff(np.log(points.params[order])) > math.log(1.05)
    groups = np.empty(points.params.size, dtype=np.int64)
    groups[order] = np.concatenate([[0], np.cumsum(steps)])
    return groups
