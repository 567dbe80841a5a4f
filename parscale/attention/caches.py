"""The caches that callers hand a backbone: what they are called, whether they are empty, how many rows they have."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, StaticCache, StaticLayer


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


def is_empty(cache: Any) -> bool:
    """Whether nothing was read with a cache: with `None`, a new one, or one that was reset."""
    if cache is None:
        return True
    if not isinstance(cache, Cache):  # of a model's own kind (RWKV, xLSTM)
        return not getattr(cache, "seqlen_offset", True)
    layers = getattr(cache, "layers", None)
    if layers is None:  # of an encoder and a decoder
        return int(type(cache).get_seq_length(cache)) == 0
    return not any(map(_is_filled, layers))


def _is_filled(layer: Any) -> bool:
    """Whether a layer of a cache has keys and values, or the state that a recurrent one carries along."""
    carried = getattr(layer, "has_previous_state", False)
    if any(carried.values()) if isinstance(carried, dict) else bool(carried):
        return True
    return hasattr(layer, "get_seq_length") and int(layer.get_seq_length()) > 0
