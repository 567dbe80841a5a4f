"""Causal attention of few tokens on a CPU, by one softmax over the scores of prefix and tokens.

Two calls of torch's flash attention that are merged write no scores. For few tokens that saves less than the second
call and the merge take.
"""

from __future__ import annotations

import torch

from parscale.kernels.decode_attention.reference import decode_attention_reference

LONGEST = 128  # tokens
MOST = 2**20  # scores, which then stay in a processor's cache


def is_short(query: torch.Tensor, prefix_length: int) -> bool:
    """Whether `causal_attention_short` is the faster way for `(R, heads, S, D)`: in float32, and without gradients."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    R, heads, S, _ = query.shape
    return query.dtype == torch.float32 and S <= LONGEST and R * heads * S * (prefix_length + S) <= MOST


def causal_attention_short(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """`parscale.kernels.causal_attention`: each token of a head is a query head of its own that sees what is before."""
    R, heads, S, D = query.shape
    later = torch.full((S, S), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
    mask = later.expand(heads, S, S).reshape(1, heads * S, 1, S)
    queries = query.reshape(R, heads * S, 1, D)
    output = decode_attention_reference(queries, key, value, prefix_k, prefix_v, mask, scaling=scaling)
    return output.view(R, heads, S, D)
