"""Decode attention by one softmax over joined keys: supports every option, but is not fast."""

from __future__ import annotations

import torch
from torch import nn

from parscale.kernels.dispatch import runs_without_autocast
from parscale.kernels.prefix import prepend, with_room


@runs_without_autocast
def decode_attention_joined(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    length: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """`parscale.kernels.decode_attention` on a copy of the cache: the baseline for the other implementations."""
    (R, heads, _, D), (_, G, T, _) = query.shape, prefix_k.shape
    K, device, dtype = key.shape[2], query.device, torch.promote_types(query.dtype, torch.float32)
    if length is not None:
        hidden = torch.arange(K, device=device) >= length.reshape(-1, 1, 1, 1)  # (R or 1, 1, 1, K)
        key, value = (x.masked_fill(hidden.mT, 0.0) for x in (key, value))  # zero times NaN is NaN
    keys, values = (
        prepend(prefix, states).repeat_interleave(heads // G, 1).to(dtype)  # (R, heads, T + K, D)
        for prefix, states in ((prefix_k, key), (prefix_v, value))
    )
    scores = (query.to(dtype) @ keys.transpose(-1, -2)) * (D**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        mask = with_room(mask, T, K)
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if length is not None:
        scores = scores.masked_fill(nn.functional.pad(hidden, (T, 0)), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype).view(1, -1, 1, 1).expand(R, -1, 1, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : T + K].nan_to_num(0.0)  # a query without visible keys gets zeros
    return (weights @ values).to(query.dtype)
