"""The caches that callers pass to a backbone: whether they are empty, and how many rows they have."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, StaticCache, StaticLayer


def fit_rows(cache: object, rows: int, copies: int) -> None:
    """Lets an empty static cache of B rows allocate its memory again, for the streams' rows, at the first keys.

    Args:
        cache: the caller's; other classes of caches are not changed.
        rows: B.
        copies: cache rows for each row of the input.

    Raises:
        ValueError: it has memory for another number of rows, or holds another number of rows of text, as one that the
            plain backbone has read.
    """
    if torch.compiler.is_compiling():
        return
    if not isinstance(cache, StaticCache):
        _check_rows(cache, rows, copies)
        return
    for layer in cache.layers:
        if not isinstance(layer, StaticLayer) or not layer.is_initialized or layer.keys is None:
            continue
        own = layer.keys.shape[0]
        if own == rows * copies:  # asked first: the number of tokens is on the device, where a graph is captured
            continue
        tokens = int(layer.get_seq_length())
        if own != rows or tokens > 0:
            raise ValueError(
                f"This static cache has {own} rows and {tokens} tokens, but {rows} rows of input need {rows * copies} "
                f"cache rows and an empty cache. Make a new one, with batch_size={rows * copies} where "
                "early_initialization asks for it."
            )
        layer.is_initialized = False


def _check_rows(cache: object, rows: int, copies: int) -> None:
    """Refuses a cache that grows and whose first layer holds keys of another number of rows than `rows * copies`."""
    layers = getattr(cache, "layers", None)
    keys = getattr(layers[0], "keys", None) if layers else None
    if keys is None or keys.numel() == 0 or keys.shape[0] == rows * copies:
        return
    raise ValueError(
        f"This cache has {keys.shape[0]} rows, but {rows} rows of input need {rows * copies}. Give a new cache, or the "
        "one that these streams have filled from as many rows. A beam search moves the rows of all streams where the "
        "model that generates is the wrapped one: wrap it, not its backbone alone."
    )


def is_empty(cache: object) -> bool:
    """Whether a cache has read no tokens: `None`, a new one, or one that was reset."""
    if cache is None:
        return True
    if not isinstance(cache, Cache):  # a model's own class (RWKV, xLSTM)
        return not getattr(cache, "seqlen_offset", True)
    layers = getattr(cache, "layers", None)
    if layers is None:  # of an encoder-decoder model
        return int(type(cache).get_seq_length(cache)) == 0
    return not any(map(_is_filled, layers))


def _is_filled(layer: Any) -> bool:
    """Whether a layer of a cache has keys and values, or the state of a recurrent layer."""
    carried = getattr(layer, "has_previous_state", False)
    if any(carried.values()) if isinstance(carried, dict) else bool(carried):
        return True
    return hasattr(layer, "get_seq_length") and int(layer.get_seq_length()) > 0
