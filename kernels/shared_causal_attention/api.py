"""Causal attention over `[prefix of stream p | tokens of stream 0]`, for prefill and training without padding.

The queries of all streams attend to stream 0's tokens in one call of torch's flash attention, as grouped queries, and
those of streams 1 to P - 1 attend to their prefix in a second call. The two are merged by their log-sum-exp. Neither
keys nor prefixes are copied, and the causal part keeps its fast path. On ROCm, whose log-sum-exp has another base in
some versions, streams 1 to P - 1 get copies of the keys after their prefixes, and nothing is merged.

Shapes: R = P*B rows, stream-major, of all streams or of the Q = P - 1 that have a prefix; G key/value heads; S tokens;
T prefix tokens; D head size.
"""

from __future__ import annotations

from typing import Any

import torch

from parscale.kernels.causal_attention.api import causal_attention
from parscale.kernels.compat import flash_for_gpu
from parscale.kernels.dispatch import autocast_dtype, wants_gradients
from parscale.kernels.flash import by_row, by_stream, flash, flash_backward, gradients_once
from parscale.kernels.shared_rows import fold_queries, plain_rows, unfold_queries


def shared_causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    *,
    scaling: float | None = None,
) -> torch.Tensor:
    """Each token attends to its stream's whole prefix and to stream 0's tokens up to its own position.

    Args:
        query: `(P*B, heads, S, D)`, stream-major rows, of all streams or of those with a prefix; tensors that
            `parscale.kernels.flash_supports` accepts.
        key: `(B, G, S, D)`, of stream 0; `heads` is a multiple of G (grouped queries).
        value: `(B, G, S, D)`.
        prefix_k: `(P - 1, G, T, D)`, of streams 1 to P - 1.
        prefix_v: `(P - 1, G, T, D)`.
        scaling: factor on the scores; `D ** -0.5` if `None`.

    Returns:
        `(P*B, heads, S, D)` in the dtype of `query`, or that of autocast; differentiable once in every tensor, and
        a second time is a `RuntimeError`.

    Raises:
        ValueError: shapes do not fit together.
    """
    plain = plain_rows(query, key, prefix_k)
    dtype = autocast_dtype(query)
    # as views: torch 2.9 loses the gradient of a parameter that was frozen after a checkpointed forward pass
    prefix = (x.view_as(x) for x in (prefix_k, prefix_v))
    query, key, value, prefix_k, prefix_v = (x.to(dtype) for x in (query, key, value, *prefix))
    if torch.version.hip is not None and not query.is_cpu:
        keys, values = (x.repeat(prefix_k.shape[0], 1, 1, 1) for x in (key, value))  # (Q*B, G, S, D)
        others = causal_attention(query[plain:], keys, values, prefix_k, prefix_v, scaling=scaling)
        first = flash_for_gpu()(query[:plain], key, value, 0.0, True, scale=scaling)[:1] if plain else ()
        return torch.cat([x.transpose(1, 2) for x in (*first, others)]).transpose(1, 2)
    if wants_gradients((query, key, value, prefix_k, prefix_v)):
        return _SharedCausalAttention.apply(query, key, value, prefix_k, prefix_v, plain, scaling)
    return _merged(query, key, value, prefix_k, prefix_v, plain, scaling)[0]


def _merged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    plain: int,
    scaling: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """The output, the log-sum-exp of the tokens' and of the prefixes' scores, and what else dropout would need.

    Returns:
        `(R, heads, S, D)`, `(R, heads, S, 1)`, `(Q*B, heads, S, 1)`, and the additional results of both calls.
    """
    (B, G), R, Q = key.shape[:2], query.shape[0], prefix_k.shape[0]
    output, lse, *random = flash(fold_queries(query, B, G), key, value, True, scaling)  # of (B, P*heads, S)
    output, lse = unfold_queries(output, R // B, G), unfold_queries(lse.unsqueeze(-1), R // B, G)
    found = flash(by_stream(query[plain:], Q), prefix_k, prefix_v, False, scaling)
    prefix_output, prefix_lse = by_row(found[0], B), by_row(found[1].unsqueeze(-1), B)
    share = torch.sigmoid(prefix_lse - lse[plain:])  # the weight of the prefix, (Q*B, heads, S, 1)
    merged = output[plain:].to(share.dtype).lerp(prefix_output.to(share.dtype), share)
    joined = [x.transpose(1, 2) for x in (output[:plain], merged.to(output.dtype))]
    output = torch.cat(joined).transpose(1, 2)  # over (R, S, heads, D), the layout of torch's own output
    return output, lse, prefix_lse, [*random, *found[2:]]


class _SharedCausalAttention(torch.autograd.Function):
    """Both parts and their merge, as one step; see `parscale.kernels.flash` for the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        prefix_k: torch.Tensor,
        prefix_v: torch.Tensor,
        plain: int,
        scaling: float | None,
    ) -> Any:
        output, lse, prefix_lse, random = _merged(query, key, value, prefix_k, prefix_v, plain, scaling)
        lse = torch.cat([lse[:plain], torch.logaddexp(lse[plain:], prefix_lse)])
        ctx.save_for_backward(query, key, value, prefix_k, prefix_v, output, lse, *random)
        ctx.plain, ctx.scaling = plain, scaling
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return *gradients_once(_gradients, ctx.plain, ctx.scaling, gradient, *ctx.saved_tensors), None, None


def _gradients(
    plain: int,
    scaling: float | None,
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    *random: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key, value and both parts of the prefix."""
    (B, G), R, Q, half = key.shape[:2], query.shape[0], prefix_k.shape[0], len(random) // 2
    folded = (fold_queries(x, B, G) for x in (gradient, query, output))
    lse_folded = fold_queries(lse, B, G).squeeze(-1).contiguous()  # (B, P*heads, S)
    folded_gradient, folded_query, folded_output = folded
    d_folded, d_key, d_value = flash_backward(
        folded_gradient, folded_query, key, value, folded_output, lse_folded, random[:half], True, scaling
    )
    d_query = unfold_queries(d_folded, R // B, G)
    of_streams = (by_stream(x[plain:], Q) for x in (gradient, query, output, lse))
    stream_gradient, stream_query, stream_output, stream_lse = of_streams
    d_queries, d_prefix_k, d_prefix_v = flash_backward(
        *(stream_gradient, stream_query, prefix_k, prefix_v, stream_output, stream_lse.squeeze(-1).contiguous()),
        *(random[half:], False, scaling),
    )
    d_query = torch.cat([d_query[:plain], d_query[plain:] + by_row(d_queries, B)])
    return d_query, d_key, d_value, d_prefix_k, d_prefix_v
