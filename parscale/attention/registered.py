"""The prefix in attention: one function that all attention layers of a wrapped model call.

transformers looks up its attention function by `config._attn_implementation`. The attention layers of a wrapped model
have an `AttentionConfig` as their configuration, which says `"parscale_sdpa"` for `"sdpa"` and so on.
`prefix_attention` is registered under these names. It puts the prefix before keys and values, adds columns for it to
the mask, and calls the backbone's own function. Everything else in the model (mask creation, `generate`,
`set_attn_implementation`) still sees the true name.

Rules: nothing hides the prefix: not padding, not causality, not a sliding window, not document boundaries.

Shapes: R = P*B rows, stream-major; S query tokens; K visible keys without the prefix; G key/value heads; D head size;
T prefix tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PreTrainedConfig

from parscale.attention.flash import flash_with_prefix
from parscale.attention.functions import AttentionFunction, Result, backbone_function, record
from parscale.attention.grouped import GROUPED
from parscale.attention.masks import extended_mask, keep_sizes_static, lengths_for_kernel
from parscale.attention.shared import attend_to_shared, keys_of_pass
from parscale.compat.transformers import (
    ATTENTION_FUNCTIONS,
    MASK_FUNCTIONS,
    ConfigView,
    attn_implementation,
    compares_implementation,
    is_flash,
)
from parscale.distributed.offloading import parameter_of
from parscale.kernels import causal_attention, decode_attention, flash_supports
from parscale.kernels.prefix import prepend
from parscale.streams.state import ParScaleState

NAME_PREFIX = "parscale_"

CONTINUOUS_BATCHING = (
    "Continuous batching and its paged attention do not run with streams: they pack all requests into one row and "
    "keep one cache for it. Use generate(), or set_streams(None) for the plain backbone, and a new manager if one has "
    "stopped for this."
)


class _BothNames(str):
    """The true name of an implementation, which as a dictionary key also finds the function with the prefix.

    A layer uses the name in two ways. It looks up its attention function, which must be ours; and some layers compare
    it with `"sdpa"` to choose the form of their own mask, which must match. Both read the same attribute, so no plain
    string works for both. A string that equals two names does, since a dictionary compares by `==`.

    The alternative, to register our function as `"sdpa"` itself, would affect every model in the process. torch.compile
    cannot trace this class, so only layers that compare the name get it
    (`parscale.compat.transformers.compares_implementation`).
    """

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or NAME_PREFIX + str(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(NAME_PREFIX + str(self))


class AttentionConfig(ConfigView):
    """The configuration that an attention layer of a wrapped model sees: a live view that changes one name.

    Args:
        config: the backbone's configuration object.
        state: the streams of the model that the layer belongs to.
        layer: the layer's class.
    """

    original: Any
    state: ParScaleState
    compared: bool
    lender: Any

    def __init__(self, config: PreTrainedConfig, state: ParScaleState, layer: type) -> None:
        super().__init__(config, state=state, compared=compares_implementation(layer), lender=None)

    def borrow(self, lender: nn.Module) -> None:
        """Makes the layer use the prefix of `lender`, whose keys and values it uses."""
        vars(self)["lender"] = lender

    def implementation(self) -> str:
        """The name that `prefix_attention` is registered under; the true name for the plain backbone."""
        true_name = attn_implementation(self.original)
        call = self.state.call
        if call.in_flight is None and call.recorder is None and call.passes is None:
            return true_name
        name = NAME_PREFIX + true_name
        if name not in ATTENTION_FUNCTIONS:
            AttentionInterface.register(name, functools.partial(prefix_attention, true_name))
        return _BothNames(true_name) if self.compared else name


def registered_layers(part: nn.Module) -> list[Any]:
    """The layers of a part of a wrapped model that take their attention from transformers' registry."""
    return [module for module in part.modules() if isinstance(module.__dict__.get("config"), AttentionConfig)]


class _LayerWithOriginalConfig:
    """An attention layer with the backbone's own configuration, for functions that read the name from there."""

    def __init__(self, module: Any) -> None:
        self.layer = module
        self.config = module.config.original

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class _UngroupedView(_LayerWithOriginalConfig):
    """An attention layer with as many key/value heads as query heads."""

    num_key_value_groups = 1


def prefix_attention(
    name: str,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Result:
    """Attention over `[prefix of stream p | cache | new tokens]`, computed by the backbone's own implementation.

    Args:
        name: of the backbone's own implementation.
        module: the attention layer; its `config` is an `AttentionConfig`.
        query: `(R, heads, S, D)`.
        key: `(R, G, K, D)`, after the cache's update.
        value: `(R, G, K, D)`; its head size may differ from the key's (MLA).
        attention_mask: the mask that the backbone's implementation expects for K keys.
        **kwargs: passed on (`scaling`, `dropout`, `sliding_window`, ...).

    Returns:
        `(R, S, heads, D)`, and the attention weights `(R, heads, S, T + K)` if the implementation returns them.
    """
    config = module.config
    state: ParScaleState = config.state
    call = state.call
    if call.recorder is not None:
        record(state, module, key, value)
    streams = call.in_flight
    owner = module if config.lender is None else call.in_running_part(config.lender)
    # torch.export cannot prove what the backbones' way to repeat heads asks of a length T + S where S may vary
    repeats = streams is not None and torch.compiler.is_exporting() and not is_flash(name) and name != GROUPED
    layer = _UngroupedView(module) if repeats else module
    if repeats:
        key, value = (_with_heads(x, query.shape[1]) for x in (key, value))
    if call.passes is not None:
        key, value, attention_mask = keys_of_pass(call, module, query, key, value, attention_mask, name)
    has_prefix = streams is not None and hasattr(owner, streams.key_name)
    if streams is None or not (has_prefix or streams.shares_keys):
        return _plain_attention(name, layer)(query, key, value, attention_mask, **kwargs)

    if name.startswith("paged|") or kwargs.get("cache") is not None:
        raise ValueError(CONTINUOUS_BATCHING)
    prefix = None
    if has_prefix:
        prefix_k = parameter_of(owner, streams.key_name).to(key.device)  # (P, G, T, D); a lender may run on another one
        prefix_v = parameter_of(owner, streams.value_name).to(key.device)
        if repeats:
            prefix_k, prefix_v = (_with_heads(x, query.shape[1]) for x in (prefix_k, prefix_v))
        if prefix_v.shape[-1] < value.shape[-1]:  # some models pad MLA's values to the keys' head size
            prefix_v = nn.functional.pad(prefix_v, (0, value.shape[-1] - prefix_v.shape[-1]))
        prefix = prefix_k, prefix_v
    if streams.shares_keys:
        return attend_to_shared(
            state,
            functools.partial(_with_prefix, state, name, layer),
            _plain_attention(name, layer),
            *(query, key, value, prefix, attention_mask),
            by_sdpa=name == "sdpa" and not _is_special(kwargs),
            causal=_is_causal(module, kwargs),
            kwargs=kwargs,
        )
    assert prefix is not None
    return _with_prefix(state, name, layer, query, key, value, *prefix, attention_mask, **kwargs)


def _plain_attention(name: str, layer: Any) -> functools.partial[Result]:
    """The backbone's own attention of a layer: `(query, key, value, mask, **kwargs)`."""
    module = layer.layer if isinstance(layer, _UngroupedView) else layer
    # a flash-attention function reads the implementation's name from the layer's configuration
    view = _LayerWithOriginalConfig(layer) if is_flash(name) else layer
    return functools.partial(backbone_function(module, name), view)


def _with_prefix(
    state: ParScaleState,
    name: str,
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Result:
    """Attention of P*B rows with keys of their own, and P prefixes `(P, G, T, D)`."""
    tensors = (query, key, value, prefix_k, prefix_v)
    if name == "sdpa" and not _is_special(kwargs):
        output = _by_own_functions(state, layer, *tensors, attention_mask, **kwargs)
        if output is not None:
            return output.transpose(1, 2), None  # (R, S, heads, D)
    plain_attention = _plain_attention(name, layer)
    if kwargs.get("position_bias") is not None:  # (R or 1, heads, S, K); the prefix has no position
        kwargs["position_bias"] = nn.functional.pad(kwargs["position_bias"], (prefix_k.shape[2], 0))
    if is_flash(name):
        flash = functools.partial(flash_with_prefix, state.call.masks, plain_attention.func, plain_attention.args[0])
        return flash(*tensors, attention_mask, **kwargs)
    if isinstance(attention_mask, BlockMask) or name == "flex_attention":
        keys, values = prepend(prefix_k, key), prepend(prefix_v, value)
        mask = extended_mask(state.call.masks, attention_mask, prefix_k.shape[2], query.shape[0])
        keep_sizes_static(query, keys, values)
        return plain_attention(query, keys, values, mask, **kwargs)
    causal = name != "eager" and _is_causal(layer, kwargs)
    return _dense_attention(state, plain_attention, name, causal, *tensors, attention_mask, **kwargs)


def _by_own_functions(
    state: ParScaleState,
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """What `sdpa` gives, without a copy of the cache or a mask over the prefix: `(R, heads, S, D)`.

    Returns:
        `None` where neither `decode_attention` nor `causal_attention` takes the tensors.
    """
    S, scaling = query.shape[2], kwargs.get("scaling")
    tensors = (query, key, value, prefix_k, prefix_v)
    if S == 1:
        length = None if mask is None else lengths_for_kernel(state.call.masks, mask, tensors, state.kernels)
        return decode_attention(*tensors, mask, length=length, scaling=scaling, impl=state.kernels)
    if mask is None and _is_causal(layer, kwargs):
        key, value = key[:, :, :S], value[:, :, :S]
        if flash_supports(query, key, value, state.kernels):
            return causal_attention(query, key, value, prefix_k, prefix_v, scaling=scaling)
    return None


def _with_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeats each key/value head for its queries: `(R, G, K, D)` to `(R, heads, K, D)`."""
    return states[:, torch.arange(heads, device=states.device) // (heads // states.shape[1])]


def _dense_attention(
    state: ParScaleState,
    plain_attention: AttentionFunction,
    name: str,
    causal: bool,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> Result:
    """For `eager`, `sdpa` and functions with their interface: a mask over `(S, K)`, or none."""
    T, S = prefix_k.shape[2], query.shape[2]
    if attention_mask is None and causal and S > 1:
        if name in MASK_FUNCTIONS:  # others are never given a mask
            # The mask that was left out stands for the causal one over the first S keys (a static cache is longer).
            key, value = key[:, :, :S], value[:, :, :S]
        # A mask that leaves room for the prefix would lose the causal fast path; T zero queries in front keep it.
        keys, values = prepend(prefix_k, key), prepend(prefix_v, value)
        queries = nn.functional.pad(query, (0, 0, T, 0))  # (R, heads, T + S, D)
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = nn.functional.pad(kwargs["position_bias"][..., : keys.shape[2]], (0, 0, T, 0))
        output, weights = plain_attention(queries, keys, values, None, **kwargs)
        return output[:, T:], weights
    mask: Any = extended_mask(state.call.masks, attention_mask, T, query.shape[0])
    return plain_attention(query, prepend(prefix_k, key), prepend(prefix_v, value), mask, **kwargs)


def _is_causal(module: object, kwargs: dict[str, Any]) -> bool:
    """Whether no mask means the causal mask."""
    causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _is_special(kwargs: dict[str, Any]) -> bool:
    """Whether the arguments ask for something that only the backbone's own function does."""
    cap, bias = kwargs.get("softcap"), kwargs.get("position_bias")
    return bool(kwargs.get("dropout")) or cap is not None or bias is not None
