"""Causal attention on a CPU: prefix and new tokens separately, by torch's flash attention, merged by log-sum-exp.

The causal mask of torch's flash attention for CPUs is aligned to the upper left, so a prefix cannot come before the
keys. The prefix is not copied for the rows of a stream, and nothing is saved for the backward pass beyond what plain
causal attention saves.

Shapes: R = P*B rows, stream-major; G key/value heads; S tokens; T prefix tokens; D head size.
"""

from __future__ import annotations

from typing import Any

import torch

from parscale.kernels.dispatch import wants_gradients
from parscale.kernels.flash import by_row, by_stream, flash, flash_backward, gradients_once


def causal_attention_merged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """`parscale.kernels.causal_attention` for tensors of one dtype on a CPU."""
    tensors = (query, key, value, prefix_k, prefix_v)
    if wants_gradients(tensors):
        return _CausalAttention.apply(*tensors, scaling)
    return _merged(*tensors, scaling)[0]


def _merged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    scaling: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output `(R, heads, S, D)`, and the log-sum-exp of the tokens' and of the prefix's scores, `(R, heads, S)`."""
    P, B = prefix_k.shape[0], query.shape[0] // prefix_k.shape[0]
    output, lse = flash(query, key, value, True, scaling)
    prefix_output, prefix_lse = flash(by_stream(query, P), prefix_k, prefix_v, False, scaling)
    prefix_output, prefix_lse = by_row(prefix_output, B), by_row(prefix_lse.unsqueeze(-1), B).squeeze(-1)
    share = torch.sigmoid(prefix_lse - lse).unsqueeze(-1)  # the prefix's part of the whole, (R, heads, S, 1)
    own, dtype = output.to(share.dtype), output.dtype  # in half precision a share close to one would leave few bits
    # torch 2.11 forgets what is done in place when it compiles the backward pass
    merge = own.lerp if torch.compiler.is_compiling() else own.lerp_
    return merge(prefix_output.to(share.dtype), share).to(dtype), lse, prefix_lse


class _CausalAttention(torch.autograd.Function):
    """Both parts and their merge, as one step; see `parscale.kernels.flash` for the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        prefix_k: torch.Tensor,
        prefix_v: torch.Tensor,
        scaling: float | None,
    ) -> Any:
        output, *parts = _merged(query, key, value, prefix_k, prefix_v, scaling)
        lse = torch.logaddexp(*parts).contiguous()
        ctx.save_for_backward(query, key, value, prefix_k, prefix_v, output, lse)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return *gradients_once(_gradients, ctx.scaling, gradient, *ctx.saved_tensors), None


def _gradients(
    scaling: float | None,
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key, value and both parts of the prefix."""
    P, B = prefix_k.shape[0], query.shape[0] // prefix_k.shape[0]
    d_query, d_key, d_value = flash_backward(gradient, query, key, value, output, lse, (), True, scaling)
    gradient, queries, output = (by_stream(x, P) for x in (gradient, query, output))
    lse = by_stream(lse.unsqueeze(-1), P).squeeze(-1).contiguous()  # (P, heads, B*S)
    d_queries, d_prefix_k, d_prefix_v = flash_backward(
        gradient, queries, prefix_k, prefix_v, output, lse, (), False, scaling
    )
    add = d_query.add if torch.compiler.is_compiling() else d_query.add_
    return add(by_row(d_queries, B)), d_key, d_value, d_prefix_k, d_prefix_v
