"""transformers: models whose attention is flash-attention, which runs on a GPU and in half precision only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from parscale.compat.names import needed
from parscale.compat.patching import replaced
from parscale.compat.transformers import MASK_FUNCTIONS, ConfigView, attn_implementation, is_flash

_FULL = (torch.float32, torch.float64)
_NAME = "_attn_implementation_internal"  # of one configuration; `_attn_implementation` also sets those inside it
_IN_TORCH = "flash_attention_in_torch"  # some models look for "flash" in the name


def flash_cannot_run(model: nn.Module, device: torch.device) -> bool:
    """Whether a model names flash-attention, which cannot run where the model is, or in float32.

    A model with weights in half precision runs it, even if some are in float32 (streams, routers, norms), as does one
    with quantized weights. One in float32 runs it only under autocast.

    Args:
        model: the model.
        device: where it computes.
    """
    unfit = device.type in ("cpu", "meta") or all(p.dtype in _FULL for p in model.parameters())
    return unfit and bool(_named_flash(model))


@contextlib.contextmanager
def flash_in_torch(model: nn.Module, device: torch.device) -> Iterator[None]:
    """In this block flash-attention runs in plain torch, which computes anywhere, if it cannot run where the model is.

    It takes the same masks and finds documents in the same way, so a pass in another thread gives the same meanwhile.
    On the meta device, where there are no positions to read, it is `"eager"`. `set_attn_implementation` gives one name
    to all parts, and looks for the package again to restore it.

    Args:
        model: the model.
        device: where it computes.
    """
    AttentionInterface.register(_IN_TORCH, _attention_in_torch)
    AttentionMaskInterface.register(_IN_TORCH, MASK_FUNCTIONS["flash_attention_2"])
    named = _named_flash(model) if flash_cannot_run(model, device) else []
    with contextlib.ExitStack() as renamed:
        for config in named:
            needed(config, _NAME)
            renamed.enter_context(replaced(config, _NAME, "eager" if device.type == "meta" else _IN_TORCH))
        yield


def _named_flash(model: nn.Module) -> list[Any]:
    """The configurations of a model and its parts that name flash-attention."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [vars(module).get("config") for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if isinstance(config, ConfigView):
            config = config.original
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            waiting += vars(config).values()
    return [config for config in found.values() if is_flash(attn_implementation(config))]


def _attention_in_torch(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' flash-attention function gives, without dropout: `(R, S, heads, Dv)` and `None`.

    Args:
        module: the attention layer.
        query: `(R, heads, S, D)`.
        key: `(R, G, K, D)`.
        value: `(R, G, K, Dv)`.
        attention_mask: padding mask, 1 for real tokens, over the first of the keys, or `None`.
        scaling: of the scores; by default `D ** -0.5`.
        sliding_window: keys that a query sees, itself included.
        softcap: of the scores.
        is_causal: by default the layer's.
        s_aux: scores of the heads' sinks, `(heads,)`.
        **kwargs: `position_ids`, `cu_seq_lens_q` and `cu_seq_lens_k` tell documents.
    """
    (R, heads, S, D), K = query.shape, key.shape[2]
    dtype = torch.promote_types(value.dtype, torch.float32)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value))
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))  # (R*K, heads, D)
    output = v.new_zeros(R * S, heads, v.shape[-1])
    for queries, keys in _sequences(R, S, K, attention_mask, query.device, **kwargs):
        scores = torch.einsum("shd,khd->hsk", q[queries], k[keys]) * (D**-0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(len(keys), device=query.device)
        distance = place[len(keys) - len(queries) :, None] - place  # to the left; aligned to the lower right
        hidden = distance < 0 if (module.is_causal if is_causal is None else is_causal) else distance < -len(keys)
        if sliding_window is not None and sliding_window < K:
            hidden = hidden | (distance.abs() >= sliding_window)
        scores = scores.masked_fill(hidden, -torch.inf)
        if s_aux is not None:
            scores = torch.cat([scores, s_aux.to(dtype)[:, None, None].expand(-1, len(queries), 1)], dim=-1)
        weights = scores.softmax(-1)[..., : len(keys)]
        output = output.index_copy(0, queries, torch.einsum("hsk,khd->shd", weights, v[keys]))
    return output.to(value.dtype).unflatten(0, (R, S)), None


def _sequences(
    R: int,
    S: int,
    K: int,
    padding: torch.Tensor | None,
    device: torch.device,
    position_ids: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    **_: Any,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Queries and keys that attend to each other, by their places among the R*S queries and R*K keys."""
    queries, keys = (torch.arange(R * length, device=device) for length in (S, K))
    rows = zip(queries.split(S), keys.split(K), strict=True)
    if padding is not None:
        for row, (own_queries, own_keys) in zip(padding.bool(), rows, strict=True):
            yield own_queries[row[-S:]], own_keys[: len(row)][row]
    elif cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        borders = (boundaries[1:-1].tolist() for boundaries in (cu_seq_lens_q, cu_seq_lens_k))
        pieces = (x.tensor_split(cuts) for x, cuts in zip((queries, keys), borders, strict=True))
        yield from zip(*pieces, strict=True)
    elif position_ids is not None and R == 1 and S == K and position_ids.shape == (1, S):
        starts = (position_ids[0, 1:] == position_ids.min()).nonzero().flatten() + 1
        yield from zip(*(x.tensor_split(starts.tolist()) for x in (queries, keys)), strict=True)
    else:
        yield from rows
