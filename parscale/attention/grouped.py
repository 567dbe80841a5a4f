"""Attention by two products that read keys and values once for all of their queries, for exported graphs.

The other implementations repeat each key/value head for its queries, or leave that to a kernel. A graph that is
exported has no such kernel, and would copy the cache at every step.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface

from parscale.compat.transformers import MASK_FUNCTIONS

GROUPED = "grouped"  # the implementation's name


def register_grouped() -> None:
    """Lets `set_attn_implementation(GROUPED)` choose `grouped_attention`, with the masks of `"sdpa"`."""
    AttentionInterface.register(GROUPED, grouped_attention)
    MASK_FUNCTIONS.register(GROUPED, MASK_FUNCTIONS["sdpa"])


def grouped_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Softmax attention of G groups of queries, without dropout.

    Args:
        module: the attention layer.
        query: `(R, heads, S, D)`; `heads` is a multiple of G.
        key: `(R, G, K, D)`.
        value: `(R, G, K, Dv)`.
        attention_mask: `(R or 1, 1, S, K)`, boolean (True: attend) or additive.
        scaling: factor on the scores; `D ** -0.5` if `None`.
        softcap: scores become `softcap * tanh(scores / softcap)` before the mask (Gemma 2).
        **kwargs: of the layer; what would change the result is refused.

    Returns:
        `(R, S, heads, Dv)`, and `None` in place of the weights.

    Raises:
        ValueError: there is no mask, or the layer asks for something else (sinks, biases of positions).
    """
    further = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if further:
        raise ValueError(
            f"{type(module).__name__} attends with {' and '.join(further)}, which an export does not support."
        )
    if attention_mask is None:
        raise ValueError(f"{type(module).__name__} attends without a mask: give attention_mask.")
    G, S = key.shape[1], query.shape[2]
    queries = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)).unflatten(1, (G, -1))
    scores = queries.flatten(2, 3) @ key.transpose(-1, -2)  # (R, G, n*S, D) -> (R, G, n*S, K)
    scores = scores.unflatten(2, (-1, S)).to(torch.promote_types(query.dtype, torch.float32))  # (R, G, n, S, K)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask = attention_mask[:, :, None]  # (R or 1, 1, 1, S, K)
    if mask.dtype == torch.bool:
        # not -inf: a row of padding sees nothing, and NaN would reach the others through its values
        scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    output = weights.flatten(2, 3) @ value  # (R, G, n*S, Dv)
    return output.unflatten(2, (-1, S)).flatten(1, 2).transpose(1, 2), None  # (R, S, heads, Dv)
