"""Tasks whose difficulty is computation for each token and not knowledge, made without end from a seed.

- `add`: two numbers of N digits, then their sum, first digit first
- `multiply`: a number of N digits times one of two, then the product, first digit first
- `hops`: a permutation of ten symbols, written out, and one of them; then where N steps of it lead
- `sort`: N numbers below 32; then the same in order
- `parity`: 24 bits; then eight bits, each the parity of N of them, always of the same places

Every eighth example, by a hash of its prompt, is held out: no model trains on it. All examples of a task are of one
length. Only the answer's tokens are learned and scored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
VOCABULARY = 48
PLUS, TIMES, EQUALS, START = 40, 41, 42, 43
_PARITY_BITS, _PARITIES, _SYMBOLS, _NUMBERS = 24, 8, 10, 32


class Examples(NamedTuple):
    """Token ids (n, S), of which the last `answer` are the answer."""

    ids: Ids
    answer: int


def examples(task: str, level: int, rng: np.random.Generator, count: int, *, held_out: bool = False) -> Examples:
    """`count` examples of a task on one side of the split."""
    kept: list[Ids] = []
    answer, found = 0, 0
    while found < count:
        ids, answer = TASKS[task](rng, 2 * count if not held_out else 16 * count, level)
        chosen = ids[_is_held_out(ids[:, :-answer]) == held_out]
        kept.append(chosen)
        found += len(chosen)
    return Examples(np.concatenate(kept)[:count], answer)


def _is_held_out(prompts: Ids) -> NDArray[np.bool_]:
    factors = np.random.default_rng(0).integers(1, 1 << 31, prompts.shape[1])
    return ((prompts + 1) @ factors >> 7) % 8 == 0


def _digits(numbers: Ids, count: int) -> Ids:
    """(n,) to (n, count), first digit first."""
    return numbers[:, None] // 10 ** np.arange(count - 1, -1, -1) % 10


def _joined(*parts: Ids | int) -> Ids:
    rows = next(len(part) for part in parts if not isinstance(part, int))
    return np.concatenate([np.full((rows, 1), part) if isinstance(part, int) else part for part in parts], axis=1)


def _add(rng: np.random.Generator, count: int, level: int) -> Examples:
    first, second = rng.integers(0, 10**level, (2, count))
    answer = _digits(first + second, level + 1)
    return Examples(_joined(START, _digits(first, level), PLUS, _digits(second, level), EQUALS, answer), level + 1)


def _multiply(rng: np.random.Generator, count: int, level: int) -> Examples:
    first, second = rng.integers(0, 10**level, count), rng.integers(0, 100, count)
    answer = _digits(first * second, level + 2)
    return Examples(_joined(START, _digits(first, level), TIMES, _digits(second, 2), EQUALS, answer), level + 2)


def _hops(rng: np.random.Generator, count: int, level: int) -> Examples:
    images = rng.permuted(np.tile(np.arange(_SYMBOLS), (count, 1)), axis=1)
    start = rng.integers(0, _SYMBOLS, (count, 1))
    answer = start
    for _ in range(level):
        answer = np.take_along_axis(images, answer, axis=1)
    return Examples(_joined(START, images, EQUALS, start, answer), 1)


def _sort(rng: np.random.Generator, count: int, level: int) -> Examples:
    numbers = rng.integers(0, _NUMBERS, (count, level))
    return Examples(_joined(START, numbers, EQUALS, np.sort(numbers, axis=1)), level)


def _parity(rng: np.random.Generator, count: int, level: int) -> Examples:
    places = np.stack([np.random.default_rng(index).permutation(_PARITY_BITS)[:level] for index in range(_PARITIES)])
    bits = rng.integers(0, 2, (count, _PARITY_BITS))
    return Examples(_joined(START, bits, EQUALS, bits[:, places].sum(2) % 2), _PARITIES)


TASKS: dict[str, Callable[[np.random.Generator, int, int], Examples]] = {
    "add": _add,
    "multiply": _multiply,
    "hops": _hops,
    "sort": _sort,
    "parity": _parity,
}
