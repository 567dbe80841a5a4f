"""Attention of streams that share the keys and values of stream 0, which is the plain backbone.

A layer projects keys and values for all P*B rows. Its cache stores and returns only those of stream 0, B rows
(`SharedCache`); without a cache, the attention function selects these rows itself. The streams are then more queries
to the same keys, and streams 1 to P - 1 also attend to a prefix of their own.

In a call with two passes (`parscale.streams.passes`) the first pass stores each layer's keys and values, and streams
1 to P - 1 attend to them in the second.

Shapes: R rows of queries, B for each stream that runs; S query tokens; K visible keys without the prefix; G key/value
heads; D head size; T prefix tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache

from parscale.attention.functions import AttentionFunction, Result
from parscale.attention.masks import Mask, Memo, last_queries_of_mask, lengths_for_kernel, rows_of_mask
from parscale.kernels import flash_supports, shared_causal_attention, shared_decode_attention
from parscale.kernels.decode_attention import fits_fused
from parscale.streams.calls import CallState
from parscale.streams.passes import TwoPasses
from parscale.streams.state import ParScaleState

SLICED = ("eager", "sdpa")  # implementations, beside flash attention, whose masks have a row for each query


class SharedCache:
    """The cache that an attention layer sees while streams share keys and values.

    Args:
        cache: the caller's, or the backbone's own.
        num_streams: P.
    """

    def __init__(self, cache: Cache, num_streams: int) -> None:
        self.cache = cache
        self.num_streams = num_streams

    def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Updates the cache with the first B of P*B rows, those of stream 0, and returns B rows."""
        B = key.shape[0] // self.num_streams
        return self.cache.update(key[:B], value[:B], *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "cache":  # during unpickling, before the attributes are set
            raise AttributeError(name)
        return getattr(self.cache, name)


class SeenTokens(DynamicCache):
    """The cache of the second pass: it reports how many tokens come before, and stores nothing.

    Args:
        tokens: how many tokens come before.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens before this pass."""
        return self.tokens

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The number of tokens before this pass."""
        return self.tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Sizes for a layer that sees every token; the masks of the first pass are used anyway."""
        return self.tokens + query_length, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int = 0, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns its arguments: the attention function takes the keys of the first pass."""
        return key_states, value_states


def can_slice(implementation: str) -> bool:
    """Whether the masks of an attention implementation can be cut to the last queries."""
    return implementation in SLICED or "flash" in implementation


def keys_of_pass(
    call: CallState,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Mask,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor, Mask]:
    """Stores what a layer attends to in the first of two passes; in the second returns it, cut to the last queries.

    Args:
        call: the current call.
        module: the layer.
        query: `(R, heads, S, D)`.
        key: `(R, G, K, D)`.
        value: `(R, G, K, Dv)`.
        mask: the mask of this pass.
        name: the attention implementation.
    """
    passes: TwoPasses | None = call.passes
    assert passes is not None
    if not passes.is_second:
        passes.keys.setdefault(module, []).append((key, value, mask))
        return key, value, mask
    key, value, mask = passes.keys[module].pop(0)
    n, S = query.shape[2], passes.length
    if mask is None and S > 1 and name in SLICED:  # no mask means the causal mask over the first S keys
        key, value = key[:, :, :S], value[:, :, :S]
        if 1 < n < S:
            mask = torch.ones(n, S, dtype=torch.bool, device=key.device).tril(S - n)[None, None]
    elif mask is not None:
        mask = last_queries_of_mask(call.masks, mask, n, passes.chosen)
    if passes.chosen is not None:
        chosen = passes.chosen.to(key.device)  # found where the logits are
        key, value = key[chosen], value[chosen]
    return key, value, mask


def attend_to_shared(
    state: ParScaleState,
    attend_with_prefix: AttentionFunction,
    plain_attention: AttentionFunction,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor] | None,
    mask: Any,
    *,
    by_sdpa: bool,
    causal: bool,
    kwargs: dict[str, Any],
) -> Result:
    """Attention of all streams, or of those with a prefix, over the keys and values of stream 0.

    Args:
        state: the model's state.
        attend_with_prefix: the backbone's attention with a prefix, for rows that have keys of their own: `(query, key,
            value, prefix_k, prefix_v, mask, **kwargs)`.
        plain_attention: the backbone's attention without a prefix: `(query, key, value, mask, **kwargs)`.
        query: `(R, heads, S, D)`, stream-major.
        key: `(B, G, K, D)`, or `(R, G, K, D)`, from which stream 0's rows are taken.
        value: `(B or R, G, K, Dv)`.
        prefix: `(P - 1, G, T, D)` and `(P - 1, G, T, Dv)`; `None` on a layer that has none.
        mask: with R rows, with one row for all, or `None`.
        by_sdpa: the implementation is `sdpa`, without arguments that only `sdpa` itself supports.
        causal: no mask means the causal mask.
        kwargs: passed to the implementation.

    Returns:
        `(R, S, heads, Dv)`, and the weights `(R, heads, S, T + K)` where the implementation has them.
    """
    call = state.call
    assert call.in_flight is not None
    second = call.passes is not None
    running = call.in_flight.num_streams - second  # stream 0 ran in the first pass
    R, S = query.shape[0], query.shape[2]
    B = R // running
    if key.shape[0] > B:  # no cache returned them
        key, value = key[:B], value[:B]
    mask = rows_of_mask(call.masks, mask, B)
    if by_sdpa and prefix is not None:
        if S == 1 and (state.kernels != "fused" or fits_fused(query, key)):
            tensors = (query, key, value, *prefix)
            length = None if mask is None else lengths_for_kernel(call.masks, mask, tensors, state.kernels)
            options: Any = {"length": length, "scaling": kwargs.get("scaling"), "impl": state.kernels}
            output = shared_decode_attention(*tensors, mask, **options)
            return output.transpose(1, 2), None  # (R, 1, heads, Dv)
        if S > 1 and mask is None and causal and flash_supports(query, key, value, state.kernels):
            output = shared_causal_attention(
                query, key[:, :, :S], value[:, :, :S], *prefix, scaling=kwargs.get("scaling")
            )
            return output.transpose(1, 2), None  # (R, S, heads, Dv)
    own = {name: _of_rows(call.masks, x, R, B) for name, x in kwargs.items()}
    outputs: list[torch.Tensor] = []
    weights: list[torch.Tensor | None] = []
    for number, rows in enumerate(query.unflatten(0, (running, -1)).unbind(0), start=int(second)):
        if number == 0 or prefix is None:
            output, weight = plain_attention(rows, key, value, mask, **own)
        else:
            prefix_k, prefix_v = (x[number - 1 : number] for x in prefix)
            output, weight = attend_with_prefix(rows, key, value, prefix_k, prefix_v, mask, **own)
        outputs.append(output)
        weights.append(weight)
    return torch.cat(outputs), _joined(weights)


def _of_rows(memo: Memo, x: object, R: int, B: int) -> object:
    """An argument of the attention function, cut to the first B rows; once for all layers that share it."""
    return rows_of_mask(memo, x, B) if isinstance(x, torch.Tensor) and x.ndim > 1 and x.shape[0] == R else x


def _joined(weights: list[torch.Tensor | None]) -> torch.Tensor | None:
    """The weights of all streams, `(R, heads, S, T + K)`; stream 0 has zeros in the T columns of the prefix."""
    found = [weight for weight in weights if weight is not None]
    if len(found) < len(weights):
        return None
    widest = max(weight.shape[-1] for weight in found)
    return torch.cat([nn.functional.pad(weight, (widest - weight.shape[-1], 0)) for weight in found])
