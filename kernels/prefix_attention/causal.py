"""Causal attention over ``[prefix of stream p | new tokens]``, for prefill and training without padding.

The two parts run apart, each by torch's own flash attention, and are merged by their log-sum-exp. The prefix is not
copied for the rows of a stream, the causal part stays causal, and nothing is kept for the backward pass beside what
plain causal attention keeps.

Shapes: R = P*B rows, stream-major; G key/value heads; S tokens; T prefix tokens; D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from parscale.kernels.compat import flash_for_cpu, flash_for_cpu_backward, flash_for_gpu, flash_for_gpu_backward
from parscale.kernels.dispatch import Impl, autocasts, transforms_are_active

HALVES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256

TWICE = (
    "Causal attention by torch's flash attention is differentiable once. For second derivatives, run the forward pass "
    "within torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or a model with attn_implementation='eager'."
)


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
    T, S, B = prefix_k.shape[2], query.shape[2], query.shape[0] // prefix_k.shape[0]
    keys, values = (
        torch.cat([prefix.repeat_interleave(B, 0), states], dim=2)
        for prefix, states in ((prefix_k, key), (prefix_v, value))
    )
    visible = torch.ones(S, T + S, dtype=torch.bool, device=query.device).tril(T)
    return nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=visible, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )


def is_mergeable(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, impl: Impl = "auto") -> bool:
    """Whether :func:`causal_attention` takes these tensors: whether torch's flash attention does, and may.

    On a CPU it takes every floating dtype; on CUDA and ROCm devices (of compute capability 8 or more) float16 and
    bfloat16, heads of up to 256 numbers, in steps of 8. Nowhere where ``torch.nn.attention.sdpa_kernel`` forbids flash
    attention, or under a transform of ``torch.func``.
    """
    if impl == "reference" or key.shape[-1] != value.shape[-1] or transforms_are_active():
        return False
    dtype, size = _autocast_dtype(query), query.shape[-1]
    if not query.is_cpu and (not query.is_cuda or dtype not in HALVES or size % 8 or size > LARGEST_HEAD):
        return False
    return _flash_runs(query.device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _flash_runs(device: torch.device) -> bool:
    if not torch.backends.cuda.flash_sdp_enabled():  # of CPUs as well
        return False
    return device.type == "cpu" or torch.cuda.get_device_properties(device).major >= 8


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    *,
    scaling: float | None = None,
) -> torch.Tensor:
    """Each token attends to its stream's whole prefix and to the tokens up to itself.

    Args:
        query: ``(P*B, heads, S, D)``, stream-major rows; tensors that :func:`is_mergeable` takes.
        key: ``(P*B, G, S, D)``; ``heads`` is a multiple of G (grouped queries).
        value: ``(P*B, G, S, D)``.
        prefix_k: ``(P, G, T, D)``, shared by the B rows of each stream.
        prefix_v: ``(P, G, T, D)``.
        scaling: factor on the scores; ``D ** -0.5`` if ``None``.

    Returns:
        ``(P*B, heads, S, D)`` in the dtype of ``query``, or that of autocast; differentiable once in every tensor, and
        a second time is a ``RuntimeError``.
    """
    dtype = _autocast_dtype(query)
    # as views: of a parameter itself, torch 2.9 loses the gradient when it was frozen after a checkpointed forward pass
    prefix = (x.view_as(x) for x in (prefix_k, prefix_v))
    tensors = (x.to(dtype) for x in (query, key, value, *prefix))
    return _CausalAttention.apply(*tensors, scaling)


def _autocast_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


class _CausalAttention(torch.autograd.Function):
    """A part's gradients follow from the merged output and log-sum-exp as if it were the whole (FlashAttention, eq. 4
    of arXiv 2205.14135): its probabilities are ``exp(scores - log-sum-exp)``."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, prefix_k: Any, prefix_v: Any, scaling: Any) -> Any:
        P, B = prefix_k.shape[0], query.shape[0] // prefix_k.shape[0]
        output, lse, *random = _flash(query, key, value, True, scaling)  # (R, heads, S, D), (R, heads, S)
        prefix_output, prefix_lse, *prefix_random = _flash(_by_stream(query, P), prefix_k, prefix_v, False, scaling)
        prefix_output, prefix_lse = _by_row(prefix_output, B), _by_row(prefix_lse.unsqueeze(-1), B).squeeze(-1)
        share = torch.sigmoid(prefix_lse - lse).unsqueeze(-1)  # the prefix's part of the whole, (R, heads, S, 1)
        # not in place, which torch 2.11 forgets when it compiles the backward pass
        output = output.lerp(prefix_output, share.to(output.dtype))
        lse = torch.logaddexp(lse, prefix_lse).contiguous()
        ctx.save_for_backward(query, key, value, prefix_k, prefix_v, output, lse, *random, *prefix_random)
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
    *random: Any,
) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key, value and both parts of the prefix."""
    P, B, half = prefix_k.shape[0], query.shape[0] // prefix_k.shape[0], len(random) // 2
    d_query, d_key, d_value = _flash_backward(gradient, query, key, value, output, lse, random[:half], True, scaling)
    gradient, queries, output = (_by_stream(x, P) for x in (gradient, query, output))
    lse = _by_stream(lse.unsqueeze(-1), P).squeeze(-1).contiguous()  # (P, heads, B*S)
    d_queries, d_prefix_k, d_prefix_v = _flash_backward(
        gradient, queries, prefix_k, prefix_v, output, lse, random[half:], False, scaling
    )
    return d_query + _by_row(d_queries, B), d_key, d_value, d_prefix_k, d_prefix_v


def _by_stream(x: torch.Tensor, P: int) -> torch.Tensor:
    """``(P*B, heads, S, D)`` as ``(P, heads, B*S, D)``: all rows of a stream meet the same prefix."""
    return x.transpose(1, 2).unflatten(0, (P, -1)).flatten(1, 2).transpose(1, 2)  # over (P, B, S, heads, D)


def _by_row(x: torch.Tensor, B: int) -> torch.Tensor:
    """``(P, heads, B*S, D)`` as ``(P*B, heads, S, D)``."""
    return x.transpose(1, 2).unflatten(1, (B, -1)).flatten(0, 1).transpose(1, 2)  # over (P, B, S, heads, D)


def _flash(query: Any, key: Any, value: Any, causal: bool, scaling: float | None) -> tuple[torch.Tensor, ...]:
    """Output ``(R, heads, S, D)`` and log-sum-exp ``(R, heads, S)``; on a GPU, two tensors that dropout would need."""
    if query.is_cpu:
        return flash_for_cpu()(query, key, value, 0.0, causal, scale=scaling)
    found = flash_for_gpu()(query, key, value, 0.0, causal, False, scale=scaling)
    output, lse, _, _, _, _, seed, offset, _ = found
    return output, lse, seed, offset


def _flash_backward(
    gradient: Any, query: Any, key: Any, value: Any, output: Any, lse: Any, random: Any, causal: bool, scaling: Any
) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key and value."""
    tensors = (gradient, query, key, value, output, lse)
    if query.is_cpu:
        return flash_for_cpu_backward()(*tensors, 0.0, causal, scale=scaling)
    sizes = (None, None, query.shape[2], key.shape[2])  # no rows of different lengths
    return flash_for_gpu_backward()(*tensors, *sizes, 0.0, causal, *random, scale=scaling)
