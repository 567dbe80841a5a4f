"""The data flow through a wrapped model.

input_ids (B, S)
  -> copied to P streams, stream-major            (P*B, S)       before the backbone's forward
  -> the backbone, unchanged, sees a batch of P*B                parscale.transforms makes the streams differ
  -> final norm                                   (P*B, S, H)
  -> aggregator                                   (B, S, H)      after the backbone, or before its pooling
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import nn
from transformers import Cache

from parscale.attention.caches import fit_rows, is_empty
from parscale.attention.registered import CONTINUOUS_BATCHING
from parscale.compat.arguments import NOISE, PAGES, by_name, given_cache
from parscale.compat.torch import replicate, unwatch_replicas, watch_replicas
from parscale.compat.transformers import answer_itself
from parscale.config import DEFAULT_SET
from parscale.hooks.encoded import mark_output
from parscale.hooks.recomputation import recompute_with_own_streams, stop_recomputing
from parscale.hooks.rows import copy_rows, first_input, refuse_encoded_rows
from parscale.hooks.two_passes import TwoPassHooks, after_pass, arguments_of_pass
from parscale.streams.backbones import masking_noise
from parscale.streams.naming import is_of_streams
from parscale.streams.sets import StreamSet
from parscale.streams.state import ParScaleState
from parscale.streams.trainability import unfreeze_outside_of_blocks
from parscale.transforms.prompt import TOKEN_COUNTS

STACKLEVEL = 6  # frames from a hook of `load_state_dict` to its caller
REPLICA = "parscale_replica"  # on a copy of a backbone or an encoder by nn.DataParallel: the original, and the set


class BackboneHooks:
    """The hooks on a model's backbone, its encoder and its other towers, shared by all sets.

    Args:
        state: the model's state.
    """

    def __init__(self, state: ParScaleState) -> None:
        self.state = state

    def attach(self) -> None:
        """Registers the hooks and stores their handles in `state.hooks`."""
        state = self.state
        hooks: list[Any] = []
        for part in state.parts:
            watch_replicas(part, functools.partial(self._replicate, part))
            hooks.append(part.register_forward_pre_hook(self._copy_to_streams, with_kwargs=True))
        if state.model is not state.backbone:
            hooks.append(state.model.register_forward_hook(self._join_router_logits))
        hooks.append(state.model.register_load_state_dict_pre_hook(self._load_into_active))
        for part in state.mixed:
            hooks.append(part.register_forward_hook(self._mix_streams))
            pooler = getattr(part, "pooler", None)
            if isinstance(pooler, nn.Module):
                hooks.append(pooler.register_forward_pre_hook(self._mix_before_pooling))
        if state.encoder is not None:
            hooks.append(state.encoder.register_forward_hook(self._mark_encoded))
        hooks += TwoPassHooks(state).attach()
        state.hooks += hooks

    # -- before the forward

    def _copy_to_streams(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the backbone or its encoder: repeats every row P times, stream-major (row `p*B + b`)."""
        state, call = self.state, self.state.call
        part, streams = module.__dict__.get(REPLICA) or (module, state.active)
        P = 1 if streams is None else streams.num_streams
        streams = None if streams is None or P == 1 else state.in_use(streams)
        call.begin(streams)
        if part is not state.encoder:
            call.part, call.running = part, module
        if torch.is_grad_enabled():
            is_compiled = torch.compiler.is_compiling()
            if not is_compiled:
                unfreeze_outside_of_blocks(state)
            if module.training or not is_compiled:
                recompute_with_own_streams(state, module)
        arguments = by_name(state.positional[part], args, kwargs)
        if streams is not None and PAGES in arguments:  # prepared while the streams were off
            raise ValueError(CONTINUOUS_BATCHING)
        cache = given_cache(arguments)
        _check_cache(cache, streams)
        call.makes_cache = cache is None
        if streams is None:
            refuse_encoded_rows(module, arguments)
            return None
        rows = first_input(module, arguments)
        if rows is None:  # the backbone raises the error for a missing input
            return None
        if isinstance(arguments.get("state"), list) and rows.shape[1] == 1:
            raise ValueError(
                f"transformers' {type(module).__name__} continues from its state with one row only, but "
                f"{P} streams need as many rows: pass use_cache=False."
            )
        fit_rows(cache, rows.shape[0], streams.cache_copies)
        if call.passes is not None and (alone := arguments_of_pass(state, module, part, arguments, rows)) is not None:
            return (), alone
        if NOISE in state.positional[part] and arguments.get(NOISE) is None:
            arguments[NOISE] = masking_noise(module, rows)
        arguments = copy_rows(module, arguments, streams.name, P, rows.shape[0])
        return (), streams.transform.before(part, arguments)

    # -- after the forward

    def _mark_encoded(self, module: nn.Module, args: tuple[Any, ...], output: object) -> Any:
        """After the encoder: marks its output with the streams that made its P*B rows."""
        streams = self.state.call.end()
        return output if streams is None else mark_output(output, streams.name, streams.num_streams)

    def _mix_before_pooling(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before a pooler inside the backbone: gives it `(B, S, H)`, or the mixed states of one token, `(B, H)`."""
        call, states = self.state.call, args[0]
        streams = call.in_flight
        if streams is None or not call.aggregating:
            return None
        size = self.state.hidden[self.state.mixed.index(call.part)].size
        if states.ndim == 3 and states.shape[1] == size != states.shape[2]:  # (P*B, H, S), as in Swin
            mixed = self._mixture(streams, streams.transform.before_pooling(states.mT)).mT
        else:
            mixed = self._mixture(streams, streams.transform.before_pooling(states))
            call.pooled = (states, mixed)
        return (mixed, *args[1:])

    def _mix_streams(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the backbone: `(P*B, S, H)` to `(B, S, H)`, also in `hidden_states[-1]` and in what heads read."""
        call = self.state.call
        call.masks.clear()
        streams = call.end()
        if call.passes is not None:
            output = after_pass(self.state, module, output)
        if call.makes_cache:
            _mark_cache(output, streams)
        if streams is None:
            return output
        unpooled = output[0]
        ends = _ends_with(output, unpooled)
        output = streams.transform.after(output)
        if getattr(output, "router_logits", None) and self.state.model is not self.state.backbone:
            output.router_logits = _router_logits_by_stream(output.router_logits, streams.num_streams)
            call.routers = streams.num_streams, len(output.router_logits)
        if not call.aggregating:
            return output
        last = output[0]
        if call.pooled is not None and call.pooled[0] is unpooled:
            mixed = call.pooled[1]
        else:
            mixed = self._mixture(streams, last)
        call.pooled = None
        with_mixed = functools.partial(self._with_mixed, streams, last, mixed)
        if isinstance(output, tuple):
            return (mixed, *map(with_mixed, output[1:], ends[1:]))
        output.last_hidden_state = mixed
        for name in ("hidden_states", "pooler_output", "last_hidden_state_ngram", "mask", "ids_restore"):
            if getattr(output, name, None) is not None:
                output[name] = with_mixed(output[name], ends[0] and name == "hidden_states")
        return output

    def _with_mixed(self, streams: StreamSet, last: torch.Tensor, mixed: torch.Tensor, states: Any, ends: bool) -> Any:
        """One output of the backbone, with the streams mixed.

        Args:
            streams: the set that ran.
            last: the final hidden states `(P*B, S, H)`.
            mixed: the mixed states `(B, S, H)`.
            states: the output.
            ends: whether it is a tuple of hidden states that ends with the final one, which the mixed states replace;
                others end with the state before the final normalization (ViT), which stays by stream.
        """
        if ends:
            return (*states[:-1], mixed)
        shape: tuple[int, ...] = getattr(states, "shape", ())
        if NOISE in self.state.positional[self.state.call.part] and len(shape) == 2:  # of patches, one for all streams
            return states[: shape[0] // streams.num_streams]
        if shape == (last.shape[0], last.shape[2]):  # states of one token, passed on as they are
            return self._mixture(streams, streams.transform.before_pooling(states))
        if len(shape) == 3 and shape[::2] == (last.shape[0], last.shape[2]):  # predicts several tokens (ProphetNet)
            return self._mixture(streams, states)
        return states

    def _mixture(self, streams: StreamSet, hidden: torch.Tensor) -> torch.Tensor:
        """`(P*B, S, H)` to `(B, S, H)`, or `(P*B, H)` to `(B, H)`."""
        aggregator = getattr(self.state.call.running, streams.aggregator_name)
        if hidden.ndim == 2:
            return aggregator(hidden[:, None], impl=self.state.kernels)[:, 0]
        return aggregator(hidden, impl=self.state.kernels)

    def _join_router_logits(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After the whole model: joins a mixture of experts' router logits by layer again, `(P*B*S, E)`."""
        call = self.state.call
        routers, call.routers = call.routers, None
        if routers is None:
            return output
        P, number = routers
        if isinstance(output, tuple):
            return tuple(_by_layer(part, P) if _are_matrices(part, number) else part for part in output)
        if getattr(output, "router_logits", None):
            output.router_logits = _by_layer(output.router_logits, P)
        return output

    # -- besides the forward pass

    def _replicate(self, part: Any) -> Any:
        """A copy for `nn.DataParallel`, whose threads do not see the context managers of their caller."""
        replica = replicate(part)
        replica.__dict__[REPLICA] = (part, self.state.active)
        return replica

    def _load_into_active(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Before `load_state_dict`: loads the released names of a saved checkpoint into the active set.

        In a checkpoint of the Trainer, the set that was active has the released names. A model's own `state_dict()` has
        every set under its own name and is left as it is. A state dict of streams alone does not say whether they are
        the default set's. If the model has that set and another is active, this warns.
        """
        streams = self.state.active
        names = {} if streams is None else self.state.names(streams)
        if streams is None or any(prefix + name in state_dict for name in names.values()):
            return
        found = [released for released in names if prefix + released in state_dict]
        for released in found:
            state_dict[prefix + names[released]] = state_dict.pop(prefix + released)
        is_other = streams.name != DEFAULT_SET and DEFAULT_SET in self.state.sets
        if found and is_other and all(map(is_of_streams, state_dict)):
            warnings.warn(
                f"This state dict holds streams alone, under the names of the set {DEFAULT_SET!r}, and is loaded into "
                f"the active set, {streams.name!r}; {DEFAULT_SET!r} stays as it is. If that is not what you want, call "
                f"set_streams({DEFAULT_SET!r}) before you load.",
                stacklevel=STACKLEVEL,
            )


def unhook(state: ParScaleState) -> None:
    """Removes the hooks that all sets of the model share."""
    for hook in state.hooks:
        hook.remove()
    stop_recomputing(state.parts)
    for part in state.parts:
        unwatch_replicas(part)


def _router_logits_by_stream(layers: tuple[torch.Tensor, ...], P: int) -> tuple[torch.Tensor, ...]:
    """Each layer's `(P*B*S, E)` as P pieces of `(B*S, E)`.

    The load-balancing loss uses the caller's mask, which has B rows. It sums over layers and tokens alike, so it treats
    the pieces as more layers and counts the real tokens of all streams.
    """
    return tuple(piece for logits in layers for piece in logits.unflatten(0, (P, -1)).unbind(0))


def _by_layer(pieces: tuple[torch.Tensor, ...], P: int) -> tuple[torch.Tensor, ...]:
    """Undoes `_router_logits_by_stream`."""
    return tuple(torch.cat(pieces[i : i + P]) for i in range(0, len(pieces), P))


def _are_matrices(part: object, number: int) -> bool:
    """Whether a part of a model's output is a tuple of that many matrices."""
    return (
        isinstance(part, tuple)
        and len(part) == number
        and all(isinstance(x, torch.Tensor) and x.ndim == 2 for x in part)
    )


def _ends_with(output: Any, last: torch.Tensor) -> list[bool]:
    """Of each part of a tuple, or of `hidden_states` alone: whether it is a tuple that ends with the final states."""
    parts = output if isinstance(output, tuple) else (getattr(output, "hidden_states", None),)
    return [isinstance(states, tuple) and bool(states) and states[-1] is last for states in parts]


def _mark_cache(output: Any, streams: StreamSet | None) -> None:
    """Marks a cache that the model made itself with the set that filled it."""
    parts = output if isinstance(output, tuple) else output.values() if isinstance(output, dict) else ()
    caches: list[Any] = [part for part in parts if isinstance(part, Cache)]
    for cache in caches:
        cache.parscale_streams = _filled_by(streams)


def _filled_by(streams: StreamSet | None) -> str | None:
    """What a cache records of the set that filled it; sets that share keys use the plain backbone's cache."""
    return None if streams is None or streams.shares_keys else streams.name


def _check_cache(cache: Any, streams: StreamSet | None) -> None:
    """Checks that a cache was filled by the active set."""
    if cache is None or isinstance(cache, (tuple, list)):  # a cache of the model's own class
        return
    name = _filled_by(streams)
    filled_by = getattr(cache, "parscale_streams", name)
    if filled_by != name:
        if not is_empty(cache):
            raise ValueError(
                f"This cache was filled with streams {filled_by!r}, but {name!r} are active (None: the plain "
                "backbone, or streams that share its keys). Start with a new cache after switching."
            )
        if isinstance(cache, Cache):
            answer_itself(cache, TOKEN_COUNTS)  # one that was reset, and counts as a prompt's
    cache.parscale_streams = name
