"""Static caches that have their memory before streams see them: of B rows, where streams write P*B."""

from __future__ import annotations

from typing import Any

import torch
from transformers import StaticCache


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
        keys = getattr(layer, "keys", None)
        if not layer.is_initialized or keys is None or keys.shape[0] == rows * num_streams:
            continue
        if keys.shape[0] != rows or int(layer.get_seq_length()) > 0:
            raise ValueError(
                f"This static cache has {keys.shape[0]} rows and {int(layer.get_seq_length())} tokens: {num_streams} "
                f"streams of {rows} rows need {rows * num_streams} rows and start with an empty one. Make a new cache, "
                f"with batch_size={rows * num_streams} where early_initialization asks for it."
            )
        layer.is_initialized = False
