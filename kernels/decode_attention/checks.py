"""The shapes that decode attention takes: its kernels read by them, and would read beside tensors that do not fit."""

from __future__ import annotations

import torch

from parscale.kernels.shapes import shapes_error


def check_decode_shapes(
    operation: str,
    tensors: tuple[torch.Tensor, ...],
    mask: torch.Tensor | None,
    length: torch.Tensor | None,
    sinks: torch.Tensor | None,
    *,
    shares_keys: bool,
) -> None:
    """Checks that all arguments of an operation fit together, in every layer for every token.

    Args:
        operation: its name.
        tensors: query, key, value, prefix_k and prefix_v.
        mask: over the cache, or over prefix and cache where the streams have keys of their own.
        length: number of real tokens, of each row of keys or of all.
        sinks: logits of each head.
        shares_keys: whether the streams share keys; their number is then left to
            `parscale.kernels.shared_rows.plain_rows`.

    Raises:
        ValueError: they do not fit; the message names the shapes that were given and those that do.
    """
    query, key, value, prefix_k, prefix_v = tensors
    if not query.ndim == key.ndim == value.ndim == prefix_k.ndim == prefix_v.ndim == 4:
        raise _tensors_error(operation, tensors, shares_keys)
    (R, heads, S, D), (rows, G, K, _), (P, _, T, _), Dv = query.shape, key.shape, prefix_k.shape, value.shape[3]
    fit = (
        S == 1
        and key.shape == (rows, G, K, D)
        and value.shape == (rows, G, K, Dv)
        and prefix_k.shape == (P, G, T, D)
        and prefix_v.shape == (P, G, T, Dv)
        and G > 0
        and heads % G == 0
        and (shares_keys or (rows == R and P > 0 and R % P == 0))
    )
    if not fit:
        raise _tensors_error(operation, tensors, shares_keys)
    if mask is not None:
        fit = mask.ndim == 4 and (mask.shape[3] == K or (not shares_keys and mask.shape[3] == T + K))
        if not (fit and mask.shape[2] == 1 and mask.shape[1] in (1, heads) and mask.shape[0] in (1, rows)):
            columns = K if shares_keys else f"{K} or {T + K}"
            raise _option_error(operation, f"a mask of shape ({rows} or 1, {heads} or 1, 1, {columns})", mask)
    if length is not None and length.numel() not in (1, rows):
        raise _option_error(operation, f"a length of 1 number, or of {rows}, one for each row of keys", length)
    if sinks is not None and (sinks.ndim != 1 or sinks.shape[0] != heads):
        raise _option_error(operation, f"sinks of shape ({heads},), one for each head", sinks)


def _tensors_error(operation: str, tensors: tuple[torch.Tensor, ...], shares_keys: bool) -> ValueError:
    rows, streams = ("B", "P - 1") if shares_keys else ("P*B", "P")
    cache = (f"key ({rows}, G, K, D)", f"value ({rows}, G, K, Dv)")
    prefix = (f"prefix_k ({streams}, G, T, D)", f"prefix_v ({streams}, G, T, Dv), with heads a multiple of G")
    return shapes_error(operation, ("query (P*B, heads, 1, D)", *cache, *prefix), tensors)


def _option_error(operation: str, allowed: str, given: torch.Tensor) -> ValueError:
    return ValueError(f"{operation} takes {allowed}, for these queries and keys, got {tuple(given.shape)}.")
