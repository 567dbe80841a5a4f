"""The prefix with flash-attention: `flash_attention_2`, `flash_attention_3` and Hub kernels with the same interface.

Their causal mask is aligned to the lower right, so T more keys at the start need no other mask. Two cases need more:
documents packed into one row, each of which must see the prefix, and a sliding window, which would hide the prefix.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import nn

from parscale.attention.functions import AttentionFunction, Result, eager_function
from parscale.attention.masks import Memo, once
from parscale.compat.transformers import ATTENTION_FUNCTIONS, attn_implementation, flash_dtype
from parscale.kernels.prefix import prepend


class Documents(NamedTuple):
    """The documents that are packed into the rows of a stream.

    Attributes:
        boundaries: where they start and end, counted through the rows, `(documents + 1,)`.
        edges: the same, on the host.
        lengths: in tokens, `(documents,)`, int32.
    """

    boundaries: torch.Tensor
    edges: list[int]
    lengths: torch.Tensor

    @property
    def longest(self) -> int:
        """The most tokens of a document."""
        return max(end - start for start, end in itertools.pairwise(self.edges))


def flash_with_prefix(
    memo: Memo,
    plain_attention: AttentionFunction,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> Result:
    """Calls `plain_attention` with the prefix `(P, G, T, D)` before the keys and values.

    A layer whose sliding window is shorter than T + K runs through `sdpa` (or `eager`, for caps or sinks) with an
    explicit mask instead: no flash-attention interface can exempt the prefix from the window.

    Args:
        memo: what was made of this pass's masks and positions.
        plain_attention: transformers' flash-attention function.
        module: the attention layer, with the backbone's own configuration; `module.layer` is the layer itself.
        query: `(P*B, heads, S, D)`.
        key: `(P*B, G, K, D)`.
        value: `(P*B, G, K, Dv)`.
        prefix_k: `(P, G, T, D)`.
        prefix_v: `(P, G, T, Dv)`.
        attention_mask: padding mask `(P*B, K)`, 1 for real tokens, or `None`.
        **kwargs: passed to `plain_attention`.

    Returns:
        `(P*B, S, heads, Dv)` and `None`.
    """
    P, T, S = prefix_k.shape[0], prefix_k.shape[2], query.shape[2]
    if attention_mask is not None:  # shorter than a static cache, whose remaining keys are not filled yet
        key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
    K, B = key.shape[2], query.shape[0] // P
    documents = packed_documents(memo, kwargs, B, S, K) if attention_mask is None else None
    if documents is not None and B > 1:  # they count through all rows of a stream
        query, key, value = (x.unflatten(0, (P, B)).transpose(1, 2).flatten(2, 3) for x in (query, key, value))
        tensors = (query, key, value, prefix_k, prefix_v)
        output, _ = flash_with_prefix(memo, plain_attention, module, *tensors, None, **kwargs)
        return output.unflatten(1, (B, S)).flatten(0, 1), None
    longest = K if documents is None else documents.longest
    window = kwargs.get("sliding_window")
    if window is not None and window < T + longest:
        mask = _windowed_mask(query, K, window, attention_mask, documents, kwargs.pop("is_causal", None), module)
        mask = nn.functional.pad(mask, (T, 0), value=True)  # (P*B or 1, 1, S, T + K)
        return _with_mask(module, query, prepend(prefix_k, key), prepend(prefix_v, value), mask, kwargs)
    if documents is not None:
        return _packed(plain_attention, module, query, key, value, prefix_k, prefix_v, documents, kwargs)
    if attention_mask is not None:
        attention_mask = nn.functional.pad(attention_mask, (T, 0), value=1)  # (P*B, T + K)
    return plain_attention(module, query, prepend(prefix_k, key), prepend(prefix_v, value), attention_mask, **kwargs)


def packed_documents(memo: Memo, kwargs: dict[str, Any], B: int, S: int, K: int) -> Documents | None:
    """The packed documents of a pass, found once for all its layers, since it waits for the device; `None` for one.

    As in transformers' own flash path, they come from `cu_seq_lens_k` if a collator gives it, or, for a batch of one
    row only, from positions that restart.

    Raises:
        ValueError: `cu_seq_lens_k` together with a cache.
    """
    given, positions = kwargs.get("cu_seq_lens_k"), kwargs.get("position_ids")
    if given is not None:
        if S != K:
            raise ValueError(
                f"cu_seq_lens_k describes documents of new tokens only, but there are {S} of them and {K} keys: with "
                "streams, packed documents run without a cache. Pass use_cache=False, or one row for each document."
            )
    elif B != 1 or S != K or positions is None or positions.ndim != 2 or positions.shape[1] != S:
        return None
    source: Any = positions if given is None else given
    find = _where_positions_restart if given is None else _between
    return once(memo, "documents", source, lambda: find(source))


def _where_positions_restart(positions: torch.Tensor) -> Documents | None:
    """The documents of the first row of `(R, S)`; `None` for one."""
    starts = (positions[0, 1:] - positions[0, :-1] != 1).nonzero().flatten() + 1
    if not len(starts):
        return None
    ends = starts.new_tensor([positions.shape[1]])
    return _between(torch.cat([starts.new_zeros(1), starts, ends]).to(torch.int32))


def _between(boundaries: torch.Tensor) -> Documents | None:
    """The documents between boundaries `(documents + 1,)`."""
    lengths = torch.diff(boundaries).to(torch.int32)
    return Documents(boundaries.detach(), boundaries.tolist(), lengths)  # detached: not what `once` waits to be gone


def _packed(
    plain_attention: AttentionFunction,
    module: object,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    documents: Documents,
    kwargs: dict[str, Any],
) -> Result:
    """Runs each document of each stream as its own sequence, with its own copy of the prefix before its keys."""
    P, S, T = query.shape[0], query.shape[2], prefix_k.shape[2]

    def joined(prefix: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        pieces = []
        for start, end in itertools.pairwise(documents.edges):
            pieces += [prefix.to(states.dtype), states[:, :, start:end]]
        rows = torch.cat(pieces, dim=2)  # (P, G, documents * T + S, D)
        return rows.transpose(0, 1).flatten(1, 2).unsqueeze(0)  # (1, G, P * (documents * T + S), D)

    def cumulative(lengths: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(lengths.repeat(P).cumsum(0, dtype=torch.int32), (1, 0))

    longest = documents.longest
    kwargs = kwargs | {
        "cu_seq_lens_q": cumulative(documents.lengths),
        "cu_seq_lens_k": cumulative(documents.lengths + T),
        "max_length_q": longest,
        "max_length_k": longest + T,
        "position_ids": None,
    }
    queries = query.transpose(0, 1).flatten(1, 2).unsqueeze(0)  # (1, heads, P * S, D)
    output, _ = plain_attention(module, queries, joined(prefix_k, key), joined(prefix_v, value), None, **kwargs)
    return output.reshape(P, S, *output.shape[2:]), None


def _with_mask(
    module: Any,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """Runs `sdpa`, or the layer's eager function for caps and sinks, which `sdpa` does not support."""
    dtype = flash_dtype(query, module)
    query, keys, values = query.to(dtype), keys.to(dtype), values.to(dtype)
    function = ATTENTION_FUNCTIONS["sdpa"]
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        function = eager_function(module.layer, attn_implementation(module.config))
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    output, _ = function(module, query, keys, values, mask, **kwargs)
    return output, None


def _windowed_mask(
    query: torch.Tensor,
    K: int,
    window: int,
    padding: torch.Tensor | None,
    documents: Documents | None,
    is_causal: bool | None,
    module: Any,
) -> torch.Tensor:
    """The mask that flash-attention would apply, `(P*B or 1, 1, S, K)`: window, causality, padding, documents."""
    S, device = query.shape[2], query.device
    keys = torch.arange(K, device=device)
    distance = torch.arange(K - S, K, device=device)[:, None] - keys[None, :]  # (S, K), aligned to the lower right
    mask = distance < window
    if module.is_causal if is_causal is None else is_causal:
        mask &= distance >= 0
    else:
        mask &= distance > -window
    if documents is not None:
        document = torch.searchsorted(documents.boundaries[1:].to(device), keys, right=True)
        mask &= document[-S:, None] == document[None, :]
    mask = mask[None, None]
    return mask if padding is None else mask & padding[:, None, None, :].bool()
