"""torch's flash attention with its log-sum-exp, by which separately computed parts of an attention are merged.

A part's gradients follow from the merged output and log-sum-exp as if the part were the whole attention: its
probabilities are `exp(scores - log-sum-exp)` (FlashAttention, eq. 4 of arXiv 2205.14135).

Shapes: R rows; P streams of B rows each; G key/value heads; S tokens; D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from parscale.kernels.compat import flash_for_cpu, flash_for_cpu_backward, flash_for_gpu, flash_for_gpu_backward

TWICE = (
    "Causal attention by torch's flash attention is differentiable once. For second derivatives, run the forward pass "
    "within torch.nn.attention.sdpa_kernel(SDPBackend.MATH), or a model with attn_implementation='eager'."
)


def flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scaling: float | None
) -> tuple[torch.Tensor, ...]:
    """Attention of `(R, heads, S, D)` over `(R, G, K, D)`.

    Returns:
        The output `(R, heads, S, D)` and the log-sum-exp `(R, heads, S)`; on a GPU also the two tensors that
        dropout would need, for `flash_backward`.
    """
    if query.is_cpu:
        return flash_for_cpu()(query, key, value, 0.0, causal, scale=scaling)
    output, lse, _, _, _, _, seed, offset, _ = flash_for_gpu()(query, key, value, 0.0, causal, False, scale=scaling)
    return output, lse, seed, offset


def flash_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    random: tuple[torch.Tensor, ...],
    causal: bool,
    scaling: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value, for an output and a log-sum-exp that may be merged ones.

    Args:
        gradient: of the output.
        query: as in `flash`.
        key: as in `flash`.
        value: as in `flash`.
        output: `(R, heads, S, D)`.
        lse: log-sum-exp `(R, heads, S)`, contiguous.
        random: the additional results of `flash`.
        causal: as in `flash`.
        scaling: as in `flash`.
    """
    tensors = (gradient, query, key, value, output, lse)
    if query.is_cpu:
        return flash_for_cpu_backward()(*tensors, 0.0, causal, scale=scaling)
    sizes = (None, None, query.shape[2], key.shape[2])  # all rows have the same length
    return flash_for_gpu_backward()(*tensors, *sizes, 0.0, causal, *random, scale=scaling)


def gradients_once(function: Callable[..., tuple[torch.Tensor, ...]], *args: Any) -> tuple[torch.Tensor, ...]:
    """Runs a backward pass that raises an error if it is differentiated itself (`create_graph`).

    torch's `once_differentiable` is not enough: a graph that requests the gradients of chosen tensors bypasses it, and
    their second derivatives would silently lack the part that comes through here.
    """
    return _Once.apply(function, *args) if torch.is_grad_enabled() else function(*args)


class _Once(torch.autograd.Function):
    """A backward pass as a separate step, which raises an error when it is differentiated."""

    @staticmethod
    def forward(ctx: object, function: Callable[..., tuple[torch.Tensor, ...]], *args: Any) -> Any:
        return function(*args)

    @staticmethod
    def backward(ctx: object, *gradients: Any) -> Any:
        raise RuntimeError(TWICE)


def by_stream(x: torch.Tensor, P: int) -> torch.Tensor:
    """`(P*B, heads, S, D)` as `(P, heads, B*S, D)`: all rows of a stream attend to the same prefix."""
    return x.transpose(1, 2).unflatten(0, (P, -1)).flatten(1, 2).transpose(1, 2)  # over (P, B, S, heads, D)


def by_row(x: torch.Tensor, B: int) -> torch.Tensor:
    """`(P, heads, B*S, D)` as `(P*B, heads, S, D)`."""
    return x.transpose(1, 2).unflatten(1, (B, -1)).flatten(0, 1).transpose(1, 2)  # over (P, B, S, heads, D)
