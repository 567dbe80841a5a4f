"""Static caches that have their memory before streams see them: of B rows, where streams write P*B."""

from __future__ import annotations

from typing import Any

import torch
from transformers import StaticCache, StaticLayer


def fit_rows(cache: Any, rows: int, num_streams: int) -> None:
    """Lets an empty static cache of B rows take its memory anew, with the first keys, for P*B.

    Args:
        cache: the caller's; other kinds stay as they are.
        rows: B.
        num_streams: P.

    Raises:
        ValueError: it has memory for another number of rows, or B rows of a text that the plain backbone has read.
    """
    if not isinstance(cache, StaticCache) or torch.compiler.is_compiling():
        return
    for layer in cache.layers:
        if not isinstance(layer, StaticLayer) or not layer.is_initialized or layer.keys is None:
            continue
        own, tokens = layer.keys.shape[0], int(layer.get_seq_length())
        if own == rows * num_streams:
            continue
        if own != rows or tokens > 0:
            raise ValueError(
                f"This static cache has {own} rows and {tokens} tokens: {num_streams} "
                f"streams of {rows} rows need {rows * num_streams} rows and start with an empty one. Make a new cache, "
                f"with batch_size={rows * num_streams} where early_initialization asks for it."
            )
        layer.is_initialized = False
