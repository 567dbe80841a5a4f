"""Decode attention over shared keys on a CPU, by torch's flash attention.

It reads the cache in one call and the prefixes in a second one, and the two are merged by their log-sum-exp.
"""

from __future__ import annotations

import torch

from parscale.kernels.flash import flash


def shared_decode_merged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """`parscale.kernels.shared_decode_attention` for tensors of one dtype on a CPU, without a mask."""
    (R, heads, _, D), (B, G, _, _), Q = query.shape, key.shape, prefix_k.shape[0]
    P, n = R // B, heads // G
    by_stream = query.view(P, B, G, n, D)
    grouped = by_stream.permute(1, 2, 0, 3, 4).reshape(B, G, P * n, D)  # all queries of a key/value head
    found = flash(grouped, key, value, False, scaling)
    output, lse = (x.view(B, G, P, n, -1).permute(2, 0, 1, 3, 4) for x in found)  # (P, B, G, n, Dv), (P, B, G, n, 1)
    with_prefix = by_stream[P - Q :].transpose(1, 2).reshape(Q, G, B * n, D)
    found = flash(with_prefix, prefix_k, prefix_v, False, scaling)
    over_prefix, prefix_lse = (x.view(Q, G, B, n, -1).transpose(1, 2) for x in found)  # (Q, B, G, n, Dv), (..., 1)
    share = torch.sigmoid(prefix_lse - lse[P - Q :])  # the weight of the prefix, (Q, B, G, n, 1)
    output[P - Q :].lerp_(over_prefix, share)
    return output.reshape(R, heads, 1, -1)
