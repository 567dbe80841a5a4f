"""Causal attention over ``[prefix of stream p | new tokens]``, for prefill and training without padding.

The two parts run apart and are merged by their log-sum-exp: nothing is joined, and nothing is kept for the backward
pass beside what plain causal attention keeps.

Shapes: R = P*B rows, stream-major; G key/value heads; S tokens; T prefix tokens; D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def causal_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    *,
    scaling: float | None = None,
) -> torch.Tensor:
    """As :func:`causal_attention`, by one softmax over the joined keys; what the merged form is held against."""
    T, S = prefix_k.shape[2], query.shape[2]
    keys, values = (torch.cat([_by_row(p, key.shape[0]), x], dim=2) for p, x in ((prefix_k, key), (prefix_v, value)))
    visible = torch.ones(S, T + S, dtype=torch.bool, device=query.device).tril(T)
    return nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=visible, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    *,
    scaling: float | None = None,
) -> torch.Tensor:
    """Each token attends to its stream's whole prefix and to the tokens up to itself. For CPU tensors.

    Args:
        query: ``(P*B, heads, S, D)``, stream-major rows.
        key: ``(P*B, G, S, D)``; ``heads`` is a multiple of G (grouped queries).
        value: ``(P*B, G, S, D)``.
        prefix_k: ``(P, G, T, D)``, shared by the B rows of each stream.
        prefix_v: ``(P, G, T, D)``.
        scaling: factor on the scores; ``D ** -0.5`` if ``None``.

    Returns:
        ``(P*B, heads, S, D)`` in the dtype of ``query``, or that of autocast; differentiable once in every tensor.
    """
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    tensors = (x.to(dtype) for x in (query, key, value, prefix_k, prefix_v))
    return _CausalAttention.apply(*tensors, scaling)


class _CausalAttention(torch.autograd.Function):
    """A part's gradients follow from the merged output and log-sum-exp as if it were the whole (FlashAttention, eq. 4
    of arXiv 2205.14135): its probabilities are ``exp(scores - log-sum-exp)``."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, prefix_k: Any, prefix_v: Any, scaling: Any) -> Any:
        keys, values = _by_row(prefix_k, query.shape[0]), _by_row(prefix_v, query.shape[0])
        output, lse = _flash(query, key, value, 0.0, True, scale=scaling)  # (R, heads, S, D), (R, heads, S)
        prefix_output, prefix_lse = _flash(query, keys, values, 0.0, False, scale=scaling)
        share = torch.sigmoid(prefix_lse - lse).unsqueeze(-1)  # the prefix's part of the whole, (R, heads, S, 1)
        output.lerp_(prefix_output, share.to(output.dtype))
        ctx.save_for_backward(query, key, value, prefix_k, prefix_v, output, torch.logaddexp(lse, prefix_lse))
        ctx.scaling = scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Any) -> Any:
        query, key, value, prefix_k, prefix_v, output, lse = ctx.saved_tensors
        keys, values = _by_row(prefix_k, query.shape[0]), _by_row(prefix_v, query.shape[0])
        d_query, d_key, d_value = _flash_backward(
            gradient, query, key, value, output, lse, 0.0, True, scale=ctx.scaling
        )
        d_prefix_query, d_keys, d_values = _flash_backward(
            gradient, query, keys, values, output, lse, 0.0, False, scale=ctx.scaling
        )
        P = prefix_k.shape[0]
        d_prefix_k, d_prefix_v = (d.unflatten(0, (P, -1)).sum(1) for d in (d_keys, d_values))  # (P, B, G, T, D)
        return d_query.add_(d_prefix_query), d_key, d_value, d_prefix_k, d_prefix_v, None


def _by_row(prefix: torch.Tensor, rows: int) -> torch.Tensor:
    """``(P, G, T, D)`` as ``(P*B, G, T, D)``."""
    P = prefix.shape[0]
    return prefix.unsqueeze(1).expand(-1, rows // P, -1, -1, -1).flatten(0, 1)
