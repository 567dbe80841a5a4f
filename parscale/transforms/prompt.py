"""`prompt`: learned embeddings before those of the input (Lester et al., arXiv 2104.08691), for each stream.

They run through the backbone like tokens, so any model with an embedding of token ids supports them, even without keys
and values (Mamba, RWKV). A row `[padding | tokens]` becomes `[padding | prompt | tokens]`, so that layers with a
recurrent state see no padding between the two; the prompt has positions 0..T-1, and the tokens start at T. The
backbone's output has only the tokens. The cache holds the prompt too, but counts only tokens. If documents are packed
into one row, each gets the prompt before it.

Windows and chunks hide the prompt from distant tokens, as they would hide text at its place.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from parscale.attention.caches import is_empty
from parscale.attention.masks import is_causal_table, leading_zeros
from parscale.compat.arguments import COPIED_FROM_FIRST_TOKEN, IMAGE_MASKS, PER_TOKEN, WHOLE_TEXT, given_cache
from parscale.compat.transformers import answer_by, answer_itself, carries_state
from parscale.distributed.offloading import parameter_of
from parscale.errors import UnsupportedModelError
from parscale.streams.backbones import (
    TRIAL_TOKENS,
    has_position_table,
    input_device,
    ordinary_tokens,
    takes_argument,
)
from parscale.streams.brief_runs import run_briefly
from parscale.streams.layer_specs import ParameterSpec
from parscale.transforms.base import EXACT, CountingTransform, difference

FIRST_LENGTH = "parscale_first_length"  # an attribute of a cache: the number of tokens in its first pass


class PromptTransform(CountingTransform):
    """`prompt` `(P, T, H)` on the backbone."""

    def parameter_specs(self) -> list[ParameterSpec]:
        """One parameter, on the backbone."""
        state, config = self.state, self.streams.config
        embeddings = _embeddings(state.backbone) if state.parts == [state.backbone] else None
        names = state.positional[state.backbone]
        pairs = "target_mapping" in names  # for pairs of tokens, which tokens are predicted (XLNet)
        if embeddings is None or "inputs_embeds" not in names or pairs:
            raise UnsupportedModelError(
                "transform='prompt' needs a backbone that reads token ids or their embeddings, and "
                f"{type(state.backbone).__name__} of {type(state.model).__name__} does not, or not alone: use "
                "transform='prefix' or transform='lora'."
            )
        width = embeddings.weight.shape[-1]
        shape = (config.num_streams, config.prefix_length, width)
        _, dtype, device = state.hidden[0]
        return [ParameterSpec(state.backbone_name, state.backbone, "prompt", shape, dtype, device)]

    def try_out(self) -> None:
        """Also tests whether the backbone reads ids as it reads their embeddings."""
        super().try_out()
        self._check_embeddings()

    def read(self, texts: torch.Tensor) -> None:
        """Stores the embeddings of the texts."""
        self.parameters()[0].copy_(_embeddings(self.state.backbone)(texts))  # (P, T) -> (P, T, H)

    def before(self, part: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
        """In the first pass of a cache, puts the prompt before the tokens; shifts positions and masks."""
        T = self.streams.config.prefix_length
        arguments = self._row_positions.of_rows(part, arguments, self.streams.num_streams)
        mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
        cache = given_cache(arguments)
        self.state.call.tokens, self.state.call.cache = None, cache
        begins = is_empty(cache)
        self._check_cache(cache, mask, begins)
        if self._most_positions is not None and not torch.compiler.is_compiling():
            self._check_positions(self._most_positions, arguments, mask, begins)
        padding = None if begins else leading_zeros(mask)
        if mask is not None and padding is not None:  # the first pass contains the prompt, even if it was padding alone
            first = getattr(cache, FIRST_LENGTH, mask.shape[-1])
            self._check_padding(padding, first, mask.shape[-1] - first, arguments)
            padding = padding.clamp(max=first)
        if isinstance(cache, Cache):
            answer_itself(cache, TOKEN_COUNTS)  # the backbone counts the prompt
        if begins:
            return self._begin(arguments, mask, positions)
        moved = {} if mask is None else {"attention_mask": _extended(mask, T, begins, padding)}
        if self._reads_whole_text:
            return arguments | moved | self._whole(arguments, positions)
        return arguments | moved | ({} if positions is None else {"position_ids": positions + T})

    def _whole(self, arguments: Mapping[str, Any], positions: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Arguments of a later pass with the whole text, and T columns before it which the cache has already."""
        T = self.streams.config.prefix_length
        named = _given(arguments, ("input_ids", *PER_TOKEN))
        whole = {name: torch.cat([value[:, :1].repeat_interleave(T, 1), value], 1) for name, value in named.items()}
        whole |= self._lengths(arguments, arguments.get("input_ids"))
        return whole | ({} if positions is None else {"position_ids": self._positions(positions, None)})

    def _lengths(self, arguments: Mapping[str, Any], ids: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The tokens in each row before its padding, `(R,)`, with the prompt's, for backbones that would count ids."""
        if not self._reads_whole_text:
            return {}
        lengths = arguments.get("lengths")
        if lengths is None and ids is not None:
            lengths = (ids != self.state.backbone.pad_index).sum(dim=1)
        return {} if lengths is None else {"lengths": lengths + self.streams.config.prefix_length}

    def _check_embeddings(self) -> None:
        """Tests whether the backbone reads ids as it reads their embeddings.

        Raises:
            UnsupportedModelError: it does not, as where it multiplies embeddings that it has looked up itself.
        """
        backbone, device = self.state.backbone, input_device(self.state.model)
        if device.type == "meta":
            return
        ids = torch.tensor([ordinary_tokens(self.state.model, TRIAL_TOKENS)], device=device)

        def by_embeddings(arguments: dict[str, Any]) -> dict[str, Any]:
            rest = {name: value for name, value in arguments.items() if name != "input_ids"}
            return rest | self._inputs_of_layers(backbone, ids) | {"inputs_embeds": _embeddings(backbone)(ids)}

        (expected,), (found,) = (
            run_briefly(self.state, change=change)
            for change in (lambda arguments: arguments | {"input_ids": ids}, by_embeddings)
        )
        if difference(found, expected) > EXACT:
            raise UnsupportedModelError(
                f"{type(backbone).__name__} of {type(self.state.model).__name__} does more with token ids than to look "
                "up their embeddings, of which transform='prompt' knows nothing: use transform='prefix' or 'lora'."
            )

    def _prompt(self, embeds: torch.Tensor) -> torch.Tensor:
        """The prompt of the running backbone before embeddings `(R, S, H)`: `(R, T, H)`, stream-major."""
        prompt = parameter_of(self.state.call.running, self.streams.own_name("prompt")).to(embeds)  # (P, T, H)
        return prompt.repeat_interleave(embeds.shape[0] // self.streams.num_streams, dim=0)

    def _check_cache(self, cache: Any, mask: Any, begins: bool) -> None:
        if isinstance(cache, StaticCache):
            raise ValueError(
                "A static cache has no room for the tokens of transform='prompt': use a dynamic one (leave out "
                "cache_implementation)."
            )
        made = isinstance(mask, dict) or (isinstance(mask, torch.Tensor) and mask.ndim > 2)
        if made and not begins and isinstance(cache, Cache) and any(cache.is_sliding):
            raise ValueError(
                f"{type(self.state.model).__name__} makes masks of its own for layers with a window, which do not know "
                "of a prompt that has left it: with a cache, use transform='prefix' or 'lora'."
            )

    def _check_padding(self, padding: torch.Tensor, first: int, read: int, arguments: dict[str, Any]) -> None:
        """In the second pass of a cache, checks that the first one contained the padding of each row.

        Args:
            padding: tokens of each row, `(R,)`.
            first: columns of the first pass.
            read: columns of the mask after those.
            arguments: of the pass.
        """
        ids = arguments.get("input_ids")
        columns = arguments["inputs_embeds"].shape[1] if ids is None else ids.shape[1]
        if torch.compiler.is_compiling() or read != columns:
            return
        counts = self._place_counts or (
            arguments.get("position_ids") is None and self.state.backbone not in self._row_positions.counting
        )
        if not counts or not (padding > first).any():
            return
        takes_positions = takes_argument(self.state.model, "position_ids")
        remedy = "pass position_ids, " if takes_positions and not self._place_counts else ""
        raise ValueError(
            f"A row has {int(padding.max())} padding tokens in front, but the first pass of its cache read {first} "
            f"columns: a prompt stands right before the tokens, and in {type(self.state.model).__name__} (windows, "
            "recurrent states or positions by column) its distance from them counts. Read all of the padding in the "
            f"first pass, {remedy}or use transform='prefix' or 'lora'."
        )

    def _check_positions(self, most: int, arguments: dict[str, Any], mask: Any, begins: bool) -> None:
        """Checks that the model's table has a position for each token of prompt and text.

        Only where there are more columns than positions are the positions themselves read, which waits for the device.

        Args:
            most: rows of the table.
            arguments: of the pass.
            mask: of its tokens and those in the cache, without the prompt.
            begins: whether the cache is empty.
        """
        T, cache, positions = self.streams.config.prefix_length, given_cache(arguments), arguments.get("position_ids")
        rows = arguments.get("input_ids")
        needed = T + (arguments["inputs_embeds"] if rows is None else rows).shape[1]
        if not begins and isinstance(cache, Cache) and not self._reads_whole_text:
            needed += cache.get_seq_length()  # without the prompt
        if needed <= most:
            return
        if positions is not None:
            needed = T + 1 + int(positions.max())
        elif isinstance(mask, torch.Tensor) and mask.ndim == 2:  # padding may have no position of its own
            needed = T + int(mask.sum(-1).max())
        if needed > most:
            raise ValueError(
                f"A prompt of {T} tokens and a text of {needed - T} need {needed} positions, and "
                f"{type(self.state.model).__name__} has {most}: give at most {max(0, most - T)} tokens, or use "
                "a shorter prompt (prefix_length), or transform='prefix' or 'lora', which take no positions."
            )

    @functools.cached_property
    def _most_positions(self) -> int | None:
        """How many positions the backbone has a table for; `None` if they are computed."""
        backbone = self.state.backbone
        return backbone.config.max_position_embeddings if has_position_table(backbone) else None

    @functools.cached_property
    def _place_counts(self) -> bool:
        """Whether padding between prompt and tokens changes a result, whatever the positions: windows or states."""
        backbone = self.state.backbone
        if any(not table[0, 0, -1, 0] for table in backbone.buffers() if is_causal_table(table)):  # GPT-Neo's window
            return True
        layers = DynamicCache(config=backbone.config).layers
        return any(getattr(layer, "is_sliding", False) or carries_state(layer) for layer in layers)

    @functools.cached_property
    def _reads_whole_text(self) -> bool:
        """Whether the backbone's input is always the whole text."""
        return type(self.state.backbone).__name__ in WHOLE_TEXT

    def _begin(self, arguments: dict[str, Any], mask: Any, positions: torch.Tensor | None) -> dict[str, Any]:
        """The arguments of a first pass: embeddings of prompt and tokens in place of ids."""
        T = self.streams.config.prefix_length
        arguments = dict(arguments)
        ids, embeds = arguments.pop("input_ids", None), arguments.get("inputs_embeds")
        if embeds is None:
            arguments |= self._inputs_of_layers(self.state.call.running, ids)
            embeds = _embeddings(self.state.call.running)(ids)  # (R, S, H)
        arguments |= self._lengths(arguments, ids)
        if mask is None and given_cache(arguments) is None and positions is not None and _restarts(positions):
            return arguments | self._packed(arguments, embeds, positions)
        padding, (R, S) = leading_zeros(mask), embeds.shape[:2]
        arguments["inputs_embeds"] = _insert(self._prompt(embeds), embeds, padding)
        columns = torch.arange(S, device=embeds.device).expand(R, -1)
        starts = 0 if padding is None else padding.to(embeds.device)[:, None]  # (R, 1)
        self.state.call.tokens = columns + T * (columns >= starts)
        for name, value in _given(arguments, PER_TOKEN).items():
            arguments[name] = _insert(_of_prompt(name, value, T), value, padding)
        for name, value in _given(arguments, IMAGE_MASKS).items():
            rows = value.transpose(1, 2)  # (R, S, 1, ...)
            own = rows.new_zeros(R, T, *rows.shape[2:])
            arguments[name] = _insert(own, rows, padding).transpose(1, 2)
        if mask is not None:
            arguments["attention_mask"] = _extended(mask, T, True, padding)
        if positions is not None:
            arguments["position_ids"] = self._positions(positions, padding)
        elif ids is not None:
            arguments |= self._positions_by_ids(ids, padding)
        return arguments

    def _inputs_of_layers(self, backbone: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The additional inputs of some backbones' layers for ids `(R, S)` (Gemma 3n, Gemma 4, Qwen4)."""
        names = self.state.positional[self.state.backbone]
        if "ple_input_ids" in names:
            return {"ple_input_ids": ids}
        if "per_layer_inputs" in names and getattr(backbone, "hidden_size_per_layer_input", None):
            given = {"input_ids": ids, "inputs_embeds": None}
            taken = inspect.signature(backbone.get_per_layer_inputs).parameters
            return {"per_layer_inputs": backbone.get_per_layer_inputs(**{k: v for k, v in given.items() if k in taken})}
        return {}

    def _positions_by_ids(self, ids: torch.Tensor, padding: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The positions that some backbones (RoBERTa) count from ids `(R, S)`, and from embeddings without padding."""
        embeddings: Any = getattr(self.state.call.running, "embeddings", None)
        count = getattr(embeddings, "create_position_ids_from_input_ids", None)
        if count is None or "position_ids" not in self.state.positional[self.state.backbone]:
            return {}
        no_padding = ids.new_full((len(ids), self.streams.config.prefix_length), embeddings.padding_idx + 1)
        return {"position_ids": count(_insert(no_padding, ids, padding), embeddings.padding_idx)}

    def _packed(
        self, arguments: Mapping[str, Any], embeds: torch.Tensor, positions: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Rows `(R, S, H)` of several documents, whose positions restart: each document gets the prompt before it.

        All rows get the length of the one with the most documents; the padding at the end is not visible to any token.
        """
        T, (R, S) = self.streams.config.prefix_length, embeds.shape[:2]
        positions = positions.expand(R, -1)
        first = torch.ones_like(positions[:, :1], dtype=torch.bool)
        starts = torch.cat([first, positions.diff(dim=-1) != 1], dim=-1)  # (R, S)
        document = starts.cumsum(-1)  # from 1
        length = S + T * int(document.max())
        tokens = torch.arange(S, device=embeds.device) + T * document  # (R, S), the places of the tokens
        self.state.call.tokens = tokens
        # the places of the prompt's tokens, (R, S, T), one place beyond the end for tokens that do not begin a document
        places = (tokens - T)[..., None] + torch.arange(T, device=embeds.device)
        places = places.where(starts[..., None], length)
        source = torch.zeros(R, length + 1, dtype=torch.long, device=embeds.device)  # of prompt and tokens, one by one
        moved = torch.arange(length + 1, device=embeds.device).repeat(R, 1)  # positions; those of the end restart
        moved -= tokens[:, -1:] + 1
        source.scatter_(1, tokens, torch.arange(S, device=embeds.device).expand(R, -1) + T)
        moved.scatter_(1, tokens, positions + T)
        own = torch.arange(T, device=embeds.device).expand(R, S, -1).flatten(1)
        source.scatter_(1, places.flatten(1), own)
        moved.scatter_(1, places.flatten(1), own)
        both = torch.cat([self._prompt(embeds), embeds], dim=1)  # (R, T + S, H)
        packed = {"inputs_embeds": _gather(both, source[:, :-1]), "position_ids": moved[:, :-1]}
        for name, value in _given(arguments, PER_TOKEN).items():
            both = torch.cat([_of_prompt(name, value, T), value], dim=1)
            packed[name] = _gather(both, source[:, :-1])
        return packed

    def _positions(self, positions: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """Positions `([3,] R or 1, S)` shifted by T, after those of the prompt."""
        T = self.streams.config.prefix_length
        own = torch.arange(T, device=positions.device).expand(*positions.shape[:-1], -1)
        if padding is None:
            return torch.cat([own, positions + T], dim=-1)
        rows = padding.shape[0]
        own, moved = (each.expand(*each.shape[:-2], rows, -1) for each in (own, positions + T))
        if positions.ndim == 3:  # by axis
            return torch.stack([_insert(*axis, padding) for axis in zip(own, moved, strict=True)])
        return _insert(own, moved, padding)

    def before_pooling(self, states: torch.Tensor) -> torch.Tensor:
        """The states of the tokens, without the prompt."""
        if states.ndim == 2:
            raise ValueError(
                f"{type(self.state.backbone).__name__} pools its first token, which is one of the prompt: use another "
                "transform."
            )
        tokens: torch.Tensor | None = self.state.call.tokens
        return states if tokens is None else _gather(states, tokens)

    def after(self, output: Any) -> Any:
        """Removes the prompt from outputs with an entry for each token, and makes the cache count only tokens."""
        call, T = self.state.call, self.streams.config.prefix_length
        index: torch.Tensor | None = call.tokens
        for cache in (call.cache, *(output if isinstance(output, tuple) else output.values())):
            if isinstance(cache, Cache):
                if index is not None:
                    setattr(cache, FIRST_LENGTH, index.shape[1])
                answer_by(cache, {name: functools.partial(method, T, cache) for name, method in TOKEN_COUNTS.items()})
        call.tokens = call.cache = None
        if not isinstance(output, tuple) and output.get("last_hidden_state_ngram") is not None:
            raise ValueError("it predicts several tokens at once, including those of a prompt")  # ProphetNet
        whole = output[0].shape[1]  # T + S, or the last tokens, if only those were requested (Gemma 4)
        if index is None or whole < index.shape[1]:
            return output
        if isinstance(output, tuple):
            return _of_tokens(output, index, whole)
        for name in ("last_hidden_state", "hidden_states", "attentions", "router_logits"):
            if output.get(name) is not None:
                output[name] = _of_tokens(output[name], index, whole)
        return output


def _given(arguments: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those of the named arguments that are not `None`."""
    return {name: arguments[name] for name in names if arguments.get(name) is not None}


def _of_prompt(name: str, value: torch.Tensor, T: int) -> torch.Tensor:
    """What an input with an entry for each token, `(R, S, ...)`, has for those of the prompt: `(R, T, ...)`."""
    own = value[:, :1] if name in COPIED_FROM_FIRST_TOKEN else torch.zeros_like(value[:, :1])
    return own.repeat_interleave(T, dim=1)


def _of_tokens(states: Any, index: torch.Tensor, whole: int) -> Any:
    """Removes the prompt's entries from a tensor with one entry for each token of prompt and text.

    Args:
        states: hidden states `(R, T + S, H)`, several of each layer `(N, R, T + S, H)` (Gemma 3n), attention weights
            `(R, heads, T + S, T + S)` (whose columns stay), router logits `(R*(T + S), E)`, or a tuple of these for the
            layers; other values are returned unchanged.
        index: `(R, S)`, the places of the tokens.
        whole: T + S.
    """
    if isinstance(states, (tuple, list)) and not isinstance(states, Cache):
        return type(states)(_of_tokens(one, index, whole) for one in states)
    if not isinstance(states, torch.Tensor):
        return states
    if states.ndim == 3 and states.shape[:2] == (index.shape[0], whole):
        return _gather(states, index)
    if states.ndim == 4 and states.shape[1:3] == (index.shape[0], whole) != states.shape[2:]:
        return torch.stack([_gather(each, index) for each in states])
    if states.ndim == 4 and states.shape[2] == whole:
        rows = states.transpose(1, 2).flatten(2)  # (R, T + S, heads * (T + S))
        return _gather(rows, index).unflatten(2, states.shape[1::2]).transpose(1, 2)
    if states.ndim == 2 and states.shape[0] == index.shape[0] * whole:
        return _gather(states.unflatten(0, (-1, whole)), index).flatten(0, 1)
    return states


def _restarts(positions: torch.Tensor) -> bool:
    """Whether positions `(R or 1, S)` belong to several documents in one row.

    Raises:
        ValueError: torch is compiling, where this is unknown.
    """
    if positions.ndim != 2 or positions.shape[-1] == 1:
        return False
    if torch.compiler.is_compiling():
        raise ValueError(
            "While torch compiles, transform='prompt' cannot see whether position_ids restart: omit them, or "
            "pass an attention_mask."
        )
    return bool((positions.diff(dim=-1) != 1).any())


def _length_without(prompt_length: int, cache: Cache, layer_idx: int = 0) -> int:
    """`cache.get_seq_length()` for code outside the backbone: counts only tokens."""
    length: int = type(cache).get_seq_length(cache, layer_idx)
    return max(length - prompt_length, 0)


def _mask_sizes_without(prompt_length: int, cache: Cache, query_length: int, layer_idx: int) -> tuple[int, int]:
    """`cache.get_mask_sizes(...)` for code outside the backbone: length and offset of only the tokens."""
    length, offset = type(cache).get_mask_sizes(cache, query_length, layer_idx)
    start = max(offset - prompt_length, 0)
    return max(offset + length - prompt_length - start, query_length), start


# The methods of a cache that are replaced while no backbone runs, so that it counts tokens without the prompt.
TOKEN_COUNTS: dict[str, Callable[..., Any]] = {"get_seq_length": _length_without, "get_mask_sizes": _mask_sizes_without}


def _embeddings(backbone: PreTrainedModel) -> Any:
    try:
        embeddings = backbone.get_input_embeddings()
    except NotImplementedError:
        return None
    return embeddings if getattr(embeddings, "weight", None) is not None and embeddings.weight.ndim == 2 else None


def _insert(new: torch.Tensor, old: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """Rows `old` `(R, K, ...)` with `new` `(R, T, ...)` inserted after their first `padding` `(R,)` entries."""
    both = torch.cat([new, old], dim=1)  # (R, T + K, ...)
    if padding is None:
        return both
    T, place = new.shape[1], torch.arange(both.shape[1], device=both.device)[None]  # (1, T + K)
    start = padding.to(both.device)[:, None]  # (R, 1)
    index = torch.where(place < start, place + T, torch.where(place < start + T, place - start, place))  # (R, T + K)
    return _gather(both, index)


def _gather(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The entries `index` `(R, S)` of each row of `(R, K, ...)`."""
    index = index.to(states.device).reshape(*index.shape, *[1] * (states.ndim - 2))
    return states.gather(1, index.expand(-1, -1, *states.shape[2:]))


def _extended(mask: Any, prompt_length: int, begins: bool, padding: torch.Tensor | None) -> Any:
    """A mask over tokens, extended to prompt and tokens; the prompt is causal and visible to every token."""
    if isinstance(mask, dict):
        return {
            kind: None if one is None else _extended(one, prompt_length, begins, None) for kind, one in mask.items()
        }
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"transform='prompt' needs a tensor as mask, got {type(mask).__name__}: use sdpa or eager.")
    T = prompt_length
    if mask.ndim == 2:
        return _insert(mask.new_ones(mask.shape[0], T), mask, padding)
    is_open, closed = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    wide = torch.cat([mask.new_full((*mask.shape[:-1], T), is_open), mask], dim=-1)  # (R, 1, S, T + K)
    if not begins:
        return wide
    own = mask.new_full((*mask.shape[:-2], T, wide.shape[-1]), closed)  # (R, 1, T, T + K)
    causal = torch.ones(T, T, dtype=torch.bool, device=mask.device).tril()
    own[..., :T] = own[..., :T].masked_fill(causal, is_open)
    return torch.cat([own, wide], dim=-2)
