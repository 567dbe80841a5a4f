"""Half-precision keys and values are converted to single precision piece by piece on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Elements of a piece, which stays in the cache of a processor and in the pool of its allocator.
PIECE = 2**20


def tokens_of_piece(key: torch.Tensor) -> int | None:
    """The number of tokens of keys `(rows, G, K, D)` that a CPU converts at once; `None`: all of them."""
    if torch.compiler.is_compiling() or not key.is_cpu:
        return None
    rows, G, _, D = key.shape
    return max(1, PIECE // (rows * G * D))


def split_tokens(x: torch.Tensor, tokens: int | None, dim: int) -> Sequence[torch.Tensor]:
    """The pieces of so many tokens, which lie along `dim`."""
    return (x,) if tokens is None else x.split(tokens, dim)
