"""Puts a stream's prefix before keys, values and masks, in plain torch."""

from __future__ import annotations

import torch
from torch import nn


def prepend(prefix: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Puts each stream's prefix `(P, G, T, D)` before its rows `(P*B, G, K, D)`, with one copy."""
    P = prefix.shape[0]
    rows = states.unflatten(0, (P, -1))  # (P, B, G, K, D)
    prefix = prefix.to(states.dtype).unsqueeze(1).expand(-1, rows.shape[1], -1, -1, -1)  # (P, B, G, T, D)
    return torch.cat([prefix, rows], dim=3).flatten(0, 1)  # (P*B, G, T + K, D)


def with_room(mask: torch.Tensor, T: int, K: int) -> torch.Tensor:
    """Extends a mask over the cache alone to prefix and cache, with the prefix visible; other masks are unchanged."""
    if mask.shape[-1] != K:
        return mask
    return nn.functional.pad(mask, (T, 0), value=mask.dtype == torch.bool)
