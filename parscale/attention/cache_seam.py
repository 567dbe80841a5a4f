"""The prefix in attention that does not come from transformers' registry: BLOOM, Falcon, GPT-J, GPT-Neo, MPT, ...

Such a layer attends to whatever its cache's `update` returns. At each call, a hook gives it a cache whose `update` puts
the prefix before the keys and values that the caller's own cache returns, or before the new ones if there is no cache.
The hook also adds columns for the prefix to the masks and position biases of the call. So the caller's cache, its
length and all positions count real tokens only.

Cross-attention reads the encoder's states, which are the same at each call: it computes their keys and values anew and
leaves the cache alone.

Rules: nothing hides the prefix: not padding, not causality, not GPT-Neo's window. With ALiBi it has positions -T..-1,
before the first real token of each row. A learned bias for pairs of tokens is zero for it.

Shapes: R = P*B rows, stream-major; S query tokens; K visible keys without the prefix; G key/value heads; D head size;
T prefix tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from parscale.attention.functions import record
from parscale.attention.masks import extend_dense_mask, extended_mask, is_causal_table
from parscale.attention.rotary import RotaryTable, rotary_tables
from parscale.compat.arguments import LAYER_CACHES, LAYER_MASKS, LAYER_SOURCES, by_name
from parscale.compat.transformers import alibi_function, attn_implementation, carries_state
from parscale.distributed.offloading import parameter_of
from parscale.errors import UnsupportedModelError
from parscale.kernels.prefix import prepend
from parscale.streams.backbones import argument_names, takes_argument
from parscale.streams.brief_runs import run_briefly, unsupported
from parscale.streams.layer_specs import AttentionLayer
from parscale.streams.state import ParScaleState

Prefix = tuple[torch.Tensor, torch.Tensor]  # keys and values, (P, G, T, D)


class PrefixCache:
    """The cache that an attention layer sees during one call.

    Args:
        cache: the caller's; `None` without one.
        prefix: the prefix to put before the keys and values, if any.
        record: called with the keys and values, if given.
    """

    def __init__(
        self, cache: Any, prefix: Prefix | None, record: Callable[[torch.Tensor, torch.Tensor], None] | None
    ) -> None:
        self.cache = cache
        self.prefix = prefix
        self.record = record

    def update(self, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Prefix:
        """Calls the caller's `update` and puts the prefix before its result: `(R, G, T + K, D)` each."""
        if self.cache is not None:
            key, value = self.cache.update(key, value, *args, **kwargs)
        if self.record is not None:
            self.record(key, value)
        if self.prefix is not None:
            key, value = prepend(self.prefix[0], key), prepend(self.prefix[1], value)
        return key, value

    def get_seq_length(self, *args: Any) -> Any:
        """Real tokens."""
        return 0 if self.cache is None else self.cache.get_seq_length(*args)

    def __getattr__(self, name: str) -> Any:
        if name == "cache":  # during unpickling, before the attributes are set
            raise AttributeError(name)
        return getattr(self.cache, name)


class CachedAttention:
    """The hook on one attention layer, and its causal tables.

    Args:
        state: the streams of the model that the layer belongs to.
        part: the part of the model (one of `state.parts`) that holds the layer.
        module: the layer; its `forward` has one of `parscale.compat.arguments.LAYER_CACHES`.
    """

    def __init__(self, state: ParScaleState, part: Any, module: nn.Module) -> None:
        self.state = state
        self.part = part
        self.module = module
        self.parameters = argument_names(module)
        self.cache_argument = next(name for name in LAYER_CACHES if name in self.parameters)
        self.trial: Prefix | None = None  # a prefix of no set, to test whether the layer accepts one
        self.tables = [name for name, buffer in module.named_buffers(recurse=False) if is_causal_table(buffer)]
        self.rotation: RotaryTable | None = None  # the table of RoFormer's sines and cosines
        self.hook = module.register_forward_pre_hook(self.before, with_kwargs=True)
        for name in self.tables:
            vars(module)[name] = _CausalTable(self, module, name)  # found before the buffer, which stays

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the layer: adds the prefix to its cache, masks and biases. Does nothing for the plain backbone."""
        prefix, recording = self.prefix(module), self.state.call.recorder is not None
        if prefix is None and not recording:
            return None
        arguments = by_name(self.parameters, args, kwargs)
        cache = arguments.get(self.cache_argument)
        if isinstance(cache, PrefixCache):  # passed on by the module around this one, which does not use it
            cache = cache.cache
        crosses = any(arguments.get(name) is not None for name in LAYER_SOURCES)
        cache = None if crosses else getattr(cache, "self_attention_cache", cache)  # of an EncoderDecoderCache
        arguments[self.cache_argument] = PrefixCache(cache, prefix, self._record if recording else None)
        if prefix is not None:
            self._make_room(module, arguments, cache, prefix[0], crosses=crosses)
        names = self.parameters[: len(args)]
        return tuple(arguments.pop(name) for name in names), arguments

    def remove(self) -> None:
        """Removes the hook and the tables."""
        self.hook.remove()
        for name in self.tables:
            vars(self.module).pop(name, None)

    def prefix(self, module: nn.Module) -> Prefix | None:
        """The prefix of the layer, or of its replica `module`, in the current pass; `None` without one."""
        streams = self.state.in_flight
        if streams is None or not hasattr(module, streams.key_name):
            return self.trial
        return parameter_of(module, streams.key_name), parameter_of(module, streams.value_name)

    def _record(self, key: torch.Tensor, value: torch.Tensor) -> None:
        record(self.state, self.module, key, value)

    def _make_room(
        self, module: nn.Module, arguments: dict[str, Any], cache: Any, prefix_k: torch.Tensor, *, crosses: bool
    ) -> None:
        """Adds T columns at the start of each mask and each bias among the arguments, in place.

        Args:
            module: the layer, or its replica.
            arguments: of the call, by name.
            cache: of the decoder's own tokens, if any.
            prefix_k: `(P, G, T, D)`.
            crosses: the keys are an encoder's, which nothing rotates or hides but the mask.
        """
        T, D = prefix_k.shape[2:]
        R, S = arguments[self.parameters[0]].shape[:2]  # of the hidden states
        implementation = attn_implementation(self.part.config)
        name = next((name for name in LAYER_MASKS if name in self.parameters), "")
        mask, alibi, bias = (arguments.get(x) for x in (name, "alibi", "position_bias"))
        if mask is not None and not crosses and arguments.get("sinusoidal_pos") is not None:
            arguments["sinusoidal_pos"] = self._rotation_of_rows(arguments["sinusoidal_pos"], mask)
        extended = None if mask is None else self._extended_mask(mask, T, R, hides=implementation == "eager")
        if mask is None and name and S > 1 and not crosses and implementation == "sdpa":
            # No mask means the causal mask over the first S keys (a static cache is longer).
            K = S if cache is None else cache.get_mask_sizes(S, getattr(self.module, "layer_idx", 0))[0]
            extended = torch.ones(S, T + K, dtype=torch.bool, device=prefix_k.device).tril(T)[None, None]
        if alibi is not None:
            own = _alibi_of_prefix(self.module, alibi.shape[0] // R if alibi.ndim == 3 else alibi.shape[1], T, alibi)
            if alibi.ndim == 3:  # BLOOM: (R * heads, 1, K)
                own = own.repeat(R, 1, 1)
            elif mask is not None:  # Falcon: (R, heads, 1, K), and in the mask (R, heads, S, K) as well
                extended = torch.cat([(own * D**-0.5).expand(*mask.shape[:-1], T), mask], dim=-1)
            arguments["alibi"] = torch.cat([own.expand(*alibi.shape[:-1], T), alibi], dim=-1)
        if bias is not None and bias.ndim == 3 and mask is not None:  # MPT: ALiBi up to the last key, (heads, 1, N)
            arguments["position_bias"] = _BiasOfRows(_alibi_of_rows(bias, T, mask))
        elif bias is not None:  # (R or 1, heads, S, K)
            arguments["position_bias"] = nn.functional.pad(bias, (T, 0))
        if extended is not None:
            arguments[name] = extended
        for table in self.tables:
            whole = vars(module)[table]
            if isinstance(whole, torch.Tensor):  # a replica on another device has it as an attribute
                vars(module)[table] = _CausalTable(self, module, table, whole)

    def _extended_mask(self, mask: torch.Tensor, T: int, rows: int, *, hides: bool) -> torch.Tensor:
        """The mask with T visible columns before it.

        Args:
            mask: `(R, 1, S, K)`, boolean or additive, or a mask of the model's own, `(R, K)` or `(R, S, K)`.
            T: prefix length.
            rows: R.
            hides: a boolean `(R, 1, S, K)` was cast from an additive mask, as MPT does, and is true where it hides.
        """
        if mask.ndim == 4 and mask.dtype == torch.bool and hides:
            return nn.functional.pad(mask, (T, 0))
        if mask.ndim == 4:
            extended = extended_mask(self.state.call.masks, mask, T, rows)
            assert isinstance(extended, torch.Tensor)
            return extended
        if mask.ndim == 2 and mask.shape[1] == 1:  # XLM's for one new token: the column stands for all keys
            return mask
        return torch.cat([mask.new_ones(*mask.shape[:-1], T), mask], dim=-1)  # 1: attend

    def _rotation_of_rows(self, rotation: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """RoFormer's sines and cosines, `(R, 1, S, D)`, for the positions of each row's tokens after its padding.

        Args:
            rotation: for their positions in the row, `(1, 1, S, D)`; its width selects the table.
            mask: `(R, 1, S, K)`, boolean (True: attend) or additive.
        """
        if self.rotation is None and not rotation.is_meta:
            self.rotation = next(iter(rotary_tables(self.state, rotation.shape[-1], self.part)), None)
        if self.rotation is None:  # the table is not RoFormer's
            return rotation
        module, name = self.rotation
        S, K = rotation.shape[-2], mask.shape[-1]
        hidden = ~mask if mask.dtype == torch.bool else mask < 0
        padding = _hidden_in_front(hidden)[:, None]  # (R, 1)
        positions = (torch.arange(K - S, K, device=mask.device) - padding).clamp(min=0)  # (R, S)
        table = getattr(module, name)
        return table[positions.to(table.device)][:, None].to(rotation.device)


class _BiasOfRows:
    """A bias `(R, heads, 1, K)` for a layer that expects one bias for all rows, `(heads, 1, K)`, and slices it.

    MPT accepts only a bias of three dimensions, and adds a slice of it to scores `(R, heads, S, K)`. With padding, the
    distance to the prefix differs between rows, which a tensor of three dimensions cannot express. So the layer gets an
    object that reports three dimensions and whose slices have four. It supports the three operations that the layer
    uses on a bias, and no others.

    Args:
        bias: the bias.
    """

    def __init__(self, bias: torch.Tensor) -> None:
        self.bias = bias
        self.shape = bias.shape[1:]

    def size(self, dim: int) -> int:
        """As `torch.Tensor.size`."""
        return self.shape[dim]

    def to(self, *args: Any, **kwargs: Any) -> _BiasOfRows:
        """As `torch.Tensor.to`; accelerate moves the arguments of layers on several devices."""
        return _BiasOfRows(self.bias.to(*args, **kwargs))

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        return self.bias[(slice(None), *index)]


class _CausalTable:
    """A layer's causal mask `(1, 1, N, N)`; in a pass with a prefix, with T visible columns before it.

    It is one of the layer's own attributes, which Python looks up before the layer's buffer of the same name. The
    buffer stays, moves with the layer, and is found again once this object is removed. An argument or a hook cannot do
    this: the layer slices its table as `self.bias[...]`. A longer table in the buffer would be shared by all threads,
    each of which may run with a prefix of another length, or without one. `torch.nn.utils.parametrize` would change the
    layer's class to one that can neither be pickled nor copied.

    Args:
        attention: the layer's hooks, which know the prefix.
        module: the layer, or its replica on another device.
        name: of the buffer: true where the row's token sees the column's. GPT-Neo's has a window.
        own: the table of a replica; by default the layer's buffer.
    """

    def __init__(
        self, attention: CachedAttention, module: nn.Module, name: str, own: torch.Tensor | None = None
    ) -> None:
        self.attention = attention
        self.module = module
        self.name = name
        self.own = own

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        """The slice `(1, 1, S, T + K)`; row indices start at the prefix, as those of the keys do."""
        table, prefix = self.whole(), self.attention.prefix(self.module)
        if prefix is None:
            return table[index]
        T, (heads, rows, columns) = prefix[0].shape[2], index[1:]
        piece = table[index[0], heads, rows.start - T : rows.stop - T, : columns.stop - T]
        return extend_dense_mask(piece, T)

    def __getattr__(self, name: str) -> Any:
        if name in ("attention", "module", "name", "own"):  # during unpickling, before the attributes are set
            raise AttributeError(name)
        return getattr(self.whole(), name)

    def whole(self) -> Any:
        """The layer's own buffer, which this object shadows, or that of the replica."""
        return nn.Module.__getattr__(self.module, self.name) if self.own is None else self.own


def _alibi_of_prefix(module: nn.Module, heads: int, T: int, alibi: torch.Tensor) -> torch.Tensor:
    """The bias of keys at -T..-1, `(heads, 1, T)`, from the function in the layer's own file that makes `alibi`."""
    build: Any = alibi_function(type(module))
    # slopes times 0..T
    ramp = build(torch.ones(1, T + 1, dtype=torch.long, device=alibi.device), heads, dtype=alibi.dtype)
    return -ramp[..., 1:].flip(-1)


def _alibi_of_rows(bias: torch.Tensor, T: int, mask: torch.Tensor) -> torch.Tensor:
    """MPT's bias with the prefix before the first real token of each row, `(R, heads, 1, T + K)`.

    Args:
        bias: `(heads, 1, N)`, slopes times `1 - N..0`; the last K entries belong to the keys.
        T: prefix length.
        mask: `(R, 1, S, K)`, true where it hides.
    """
    K = mask.shape[-1]
    padding = _hidden_in_front(mask)
    distance = torch.arange(K + T - 1, K - 1, -1, device=bias.device) - padding[:, None]  # (R, T), to the last key
    own = bias[..., -2:-1] * distance[:, None, None]  # (R, heads, 1, T)
    return torch.cat([own.to(bias.dtype), bias[..., -K:].expand(mask.shape[0], -1, -1, -1)], dim=-1)


def _hidden_in_front(mask: torch.Tensor) -> torch.Tensor:
    """The number of leading keys hidden from the last query of each row, `(R,)`; the mask is true where it hides."""
    return mask[:, 0, -1].long().cumprod(dim=-1).sum(dim=-1)


def attach_caches(state: ParScaleState, parts: list[Any]) -> list[AttentionLayer]:
    """Hooks and records the attention layers that update a cache.

    Args:
        state: the model's state.
        parts: those of `state.parts` in which no layer looks up its attention in transformers' registry.

    Raises:
        UnsupportedModelError: there is no such layer in the backbone, which is one of them, or one fails with a prefix
            before its keys.
    """
    hooked = _record_layers(state, parts)
    name = type(state.model).__name__
    if state.backbone in parts and not any(attention.part is state.backbone for attention, _ in hooked):
        for attention, _ in hooked:
            attention.remove()
        alone = len(parts) == len(state.parts) and not hooked
        whole = name if alone else f"the part {type(state.backbone).__name__} of {name}"
        raise UnsupportedModelError(
            f"No attention was found in {whole}: none of its layers takes its attention function from transformers' "
            "registry (ALL_ATTENTION_FUNCTIONS), or its keys and values from a cache (Cache.update), where streams put "
            "their prefix. Models without keys and values (Mamba, RWKV), and old ones that attend without such a cache "
            "(GPT-1, XLNet, Reformer), have no place for one."
        )
    if not hooked:
        return []
    sentence = (
        f"{name} has no place for a prefix: its attention ({type(hooked[0][0].module).__name__}) takes more keys than "
        "there are tokens from its cache, but then fails, since something else in it has one entry for each token: {}"
    )
    try:
        with unsupported(sentence):
            for attention, layer in hooked:
                keys, values = (
                    torch.zeros(1, layer.key_heads, 1, size, dtype=layer.dtype, device=layer.device)
                    for size in (layer.key_size, layer.value_size)
                )
                attention.trial = keys, values
            run_briefly(state)
    except BaseException:
        for attention, _ in hooked:
            attention.remove()
        raise
    finally:
        for attention, _ in hooked:
            attention.trial = None
    state.hooks += [attention for attention, _ in hooked]
    return [layer for _, layer in hooked]


def _record_layers(state: ParScaleState, parts: list[Any]) -> list[tuple[CachedAttention, AttentionLayer]]:
    """Hooks the layers that take a cache, runs the model briefly, and keeps the hooks of those that updated it."""
    names = {id(module): name for name, module in state.model.named_modules()}
    takes_cache = {module: part for part in parts for module in part.modules() if _takes_cache(module)}
    if takes_cache and all(map(carries_state, DynamicCache(config=state.backbone.config).layers)):
        return []  # their cache holds no keys (Mamba)
    candidates = {id(module): CachedAttention(state, part, module) for module, part in takes_cache.items()}
    found: dict[int, AttentionLayer] = {}

    def find(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        if id(module) in candidates:  # else in another part
            found[id(module)] = AttentionLayer.of(names[id(module)], module, key, value)

    if candidates:
        try:
            with state.calls.recording(find):
                run_briefly(state)
        except BaseException:
            found.clear()
            raise
        finally:
            for key, attention in candidates.items():
                if key not in found:
                    attention.remove()
    return [(candidates[key], layer) for key, layer in found.items()]


def _takes_cache(module: nn.Module) -> bool:
    if isinstance(module, (PreTrainedModel, nn.ModuleList)):
        return False
    return any(takes_argument(module, name) for name in LAYER_CACHES)
