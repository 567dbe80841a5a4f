"""The prefix under flash-attention: ``flash_attention_2``, ``flash_attention_3`` and Hub kernels of their contract.

Their causal mask is aligned to the lower right, so keys with T more rows in front need no other mask. Two cases need
more: documents packed in one row, each of which must see the prefix, and a sliding window, which would hide it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def flash_with_prefix(
    backbone: AttentionFunction,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Calls ``backbone`` with the prefix ``(P, G, T, D)`` in front of the keys and values.

    A layer with a sliding window that T + K tokens exceed runs through ``sdpa`` with an explicit mask instead: no
    flash-attention interface leaves the prefix out of its window.

    Args:
        backbone: transformers' flash-attention function.
        module: the attention layer, with the backbone's own configuration.
        query: ``(P*B, heads, S, D)``.
        key: ``(P*B, G, K, D)``.
        value: ``(P*B, G, K, Dv)``.
        prefix_k: ``(P, G, T, D)``.
        prefix_v: ``(P, G, T, Dv)``.
        attention_mask: padding mask ``(P*B, K)``, 1 for real tokens, or ``None``.

    Returns:
        ``(P*B, S, heads, Dv)`` and ``None``.
    """
    from parscale.attention import prepend

    T, K = prefix_k.shape[2], key.shape[2]
    boundaries = None
    if attention_mask is None and query.shape[2] == K:
        boundaries = document_boundaries(kwargs, prefix_k.shape[0], K, rows=query.shape[0])
    window = kwargs.get("sliding_window")
    if window is not None and window < T + K:
        mask = _windowed_mask(query, K, window, attention_mask, boundaries, kwargs.get("is_causal"), module)
        mask = nn.functional.pad(mask, (T, 0), value=True)  # (P*B or 1, 1, S, T + K)
        for name in ("sliding_window", "is_causal"):
            kwargs.pop(name, None)
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, prepend(prefix_k, key), prepend(prefix_v, value), mask, **kwargs)
    if boundaries is not None:
        return _packed(backbone, module, query, key, value, prefix_k, prefix_v, boundaries, kwargs)
    if attention_mask is not None:
        attention_mask = nn.functional.pad(attention_mask, (T, 0), value=1)  # (P*B, T + K)
    return backbone(module, query, prepend(prefix_k, key), prepend(prefix_v, value), attention_mask, **kwargs)


def document_boundaries(kwargs: dict[str, Any], P: int, K: int, rows: int) -> torch.Tensor | None:
    """Where documents packed in a single row begin and end: ``(documents + 1,)``, or ``None`` if there is one.

    As transformers' own flash path does, reads ``cu_seq_lens_k`` where a collator gives it and positions that restart
    otherwise, and only for a batch of one row.
    """
    if rows != P:  # B > 1
        return None
    if kwargs.get("cu_seq_lens_k") is not None:
        return kwargs["cu_seq_lens_k"]
    positions = kwargs.get("position_ids")
    if positions is None or positions.ndim != 2 or positions.shape[1] != K:
        return None
    starts = (positions[0, 1:] - positions[0, :-1] != 1).nonzero().flatten() + 1
    if not len(starts):
        return None
    ends = starts.new_tensor([K])
    return torch.cat([starts.new_zeros(1), starts, ends]).to(torch.int32)


def _packed(
    backbone: AttentionFunction,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    boundaries: torch.Tensor,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Every document of every stream as a sequence of its own, with a prefix of its own in front of its keys."""
    P, S, T = query.shape[0], query.shape[2], prefix_k.shape[2]
    edges = boundaries.tolist()
    lengths = torch.diff(boundaries).to(torch.int32)  # (documents,)

    def joined(prefix: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        pieces = []
        for start, end in itertools.pairwise(edges):
            pieces += [prefix.to(states.dtype), states[:, :, start:end]]
        rows = torch.cat(pieces, dim=2)  # (P, G, documents * T + S, D)
        return rows.transpose(0, 1).flatten(1, 2).unsqueeze(0)  # (1, G, P * (documents * T + S), D)

    def cumulative(lengths: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(lengths.repeat(P).cumsum(0, dtype=torch.int32), (1, 0))

    longest = int(lengths.max())
    kwargs = kwargs | {
        "cu_seq_lens_q": cumulative(lengths),
        "cu_seq_lens_k": cumulative(lengths + T),
        "max_length_q": longest,
        "max_length_k": longest + T,
        "position_ids": None,
    }
    queries = query.transpose(0, 1).flatten(1, 2).unsqueeze(0)  # (1, heads, P * S, D)
    output, _ = backbone(module, queries, joined(prefix_k, key), joined(prefix_v, value), None, **kwargs)
    return output.reshape(P, S, *output.shape[2:]), None


def _windowed_mask(
    query: torch.Tensor,
    K: int,
    window: int,
    padding: torch.Tensor | None,
    boundaries: torch.Tensor | None,
    is_causal: bool | None,
    module: Any,
) -> torch.Tensor:
    """What flash-attention would mask, as booleans ``(P*B or 1, 1, S, K)``: window, causality, padding, documents."""
    S, device = query.shape[2], query.device
    keys = torch.arange(K, device=device)
    distance = torch.arange(K - S, K, device=device)[:, None] - keys[None, :]  # (S, K), aligned to the lower right
    mask = distance < window
    if module.is_causal if is_causal is None else is_causal:
        mask &= distance >= 0
    else:
        mask &= distance > -window
    if boundaries is not None:
        document = torch.searchsorted(boundaries[1:].to(device), keys, right=True)
        mask &= document[-S:, None] == document[None, :]
    mask = mask[None, None]
    return mask if padding is None else mask & padding[:, None, None, :].bool()
