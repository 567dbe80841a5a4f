"""Causal attention on a CPU: prefix and new tokens apart, each by torch's flash attention, merged by log-sum-exp.

The causal mask of torch's flash attention for CPUs is aligned to the upper left, so that a prefix cannot lie in front
of the keys. The prefix is not copied for the rows of a stream, and nothing is kept for the backward pass beside what
plain causal attention keeps.

Shapes: R = P*B rows, stream-major; G key/value heads; S tokens; T prefix tokens; D head size.
"""

from __future__ import annotations

from typing import Any

import torch

from parscale.kernels.compat import flash_for_cpu, flash_for_cpu_backward

TWICE = (
    "Causal attention by torch's flash attention is differentiable once. For second derivatives, run the forward pass "
    "within torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or a model with attn_implementation='eager'."
)


def causal_attention_merged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """As :func:`parscale.kernels.causal_attention`, for tensors of one dtype on a CPU."""
    return _CausalAttention.apply(query, key, value, prefix_k, prefix_v, scaling)


class _CausalAttention(torch.autograd.Function):
    """A part's gradients follow from the merged output and log-sum-exp as if it were the whole.

    Its probabilities are ``exp(scores - log-sum-exp)`` (FlashAttention, eq. 4 of arXiv 2205.14135).
    """

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, prefix_k: Any, prefix_v: Any, scaling: Any) -> Any:
        P, B = prefix_k.shape[0], query.shape[0] // prefix_k.shape[0]
        output, lse = flash_for_cpu()(query, key, value, 0.0, True, scale=scaling)  # (R, heads, S, D), (R, heads, S)
        prefix_output, prefix_lse = flash_for_cpu()(_by_stream(query, P), prefix_k, prefix_v, 0.0, False, scale=scaling)
        prefix_output, prefix_lse = _by_row(prefix_output, B), _by_row(prefix_lse.unsqueeze(-1), B).squeeze(-1)
        share = torch.sigmoid(prefix_lse - lse).unsqueeze(-1)  # the prefix's part of the whole, (R, heads, S, 1)
        # not in place, which torch 2.11 forgets when it compiles the backward pass
        output = output.lerp(prefix_output, share.to(output.dtype))
        lse = torch.logaddexp(lse, prefix_lse).contiguous()
        ctx.save_for_backward(query, key, value, prefix_k, prefix_v, output, lse)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        if torch.is_grad_enabled():  # create_graph
            return *_Gradients.apply(ctx.scaling, gradient, *ctx.saved_tensors), None
        return *_gradients(ctx.scaling, gradient, *ctx.saved_tensors), None


class _Gradients(torch.autograd.Function):
    """The backward pass as a step of its own, which says that it is not differentiable.

    torch's ``once_differentiable`` would not: a graph that asks for the gradients of chosen tensors passes it by, and
    their second derivatives would lack what comes through here.
    """

    @staticmethod
    def forward(ctx: Any, scaling: Any, *tensors: Any) -> Any:
        return _gradients(scaling, *tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(TWICE)


def _gradients(
    scaling: float | None,
    gradient: Any,
    query: Any,
    key: Any,
    value: Any,
    prefix_k: Any,
    prefix_v: Any,
    output: Any,
    lse: Any,
) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key, value and both parts of the prefix."""
    P, B = prefix_k.shape[0], query.shape[0] // prefix_k.shape[0]
    tensors = (gradient, query, key, value, output, lse)
    d_query, d_key, d_value = flash_for_cpu_backward()(*tensors, 0.0, True, scale=scaling)
    gradient, queries, output = (_by_stream(x, P) for x in (gradient, query, output))
    lse = _by_stream(lse.unsqueeze(-1), P).squeeze(-1).contiguous()  # (P, heads, B*S)
    d_queries, d_prefix_k, d_prefix_v = flash_for_cpu_backward()(
        gradient, queries, prefix_k, prefix_v, output, lse, 0.0, False, scale=scaling
    )
    return d_query + _by_row(d_queries, B), d_key, d_value, d_prefix_k, d_prefix_v


def _by_stream(x: torch.Tensor, P: int) -> torch.Tensor:
    """``(P*B, heads, S, D)`` as ``(P, heads, B*S, D)``: all rows of a stream meet the same prefix."""
    return x.transpose(1, 2).unflatten(0, (P, -1)).flatten(1, 2).transpose(1, 2)  # over (P, B, S, heads, D)


def _by_row(x: torch.Tensor, B: int) -> torch.Tensor:
    """``(P, heads, B*S, D)`` as ``(P*B, heads, S, D)``."""
    return x.transpose(1, 2).unflatten(1, (B, -1)).flatten(0, 1).transpose(1, 2)  # over (P, B, S, heads, D)
