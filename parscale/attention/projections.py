"""Keys and values of streams that share those of stream 0: the layers that project them see stream 0's rows alone.

An attention layer projects P*B rows, and only B of them are read. The linear layers that make nothing but keys and
values get stream 0's rows alone. Their results are repeated for the other streams: nobody reads the copies, but the
layer's own code needs as many rows as before. The layer's cache gets stream 0's rows alone too.

Whether a linear layer makes nothing else is found out by names and an experiment: noise on the other rows of its result
must change nothing, to the last bit. Where queries come out of the same layer (GPT-2, Phi-3), nothing is saved.

Shapes: R rows that run, B for each of the running streams; S tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import Cache, Conv1D, DynamicCache, EncoderDecoderCache

from parscale.attention.registered import registered_layers
from parscale.attention.shared import SharedCache
from parscale.compat.arguments import by_name
from parscale.streams.backbones import argument_names, cache_argument, input_device, ordinary_tokens
from parscale.streams.brief_runs import examining, in_this_thread, is_machine_error
from parscale.streams.sets import StreamSet
from parscale.streams.state import ParScaleState

NARROWED = ("k_proj", "v_proj", "kv_a_proj_with_mqa")
BEHIND_THE_CACHE = ("kv_b_proj",)  # of MLA: it runs on what the cache returns, and is left as it is
NOISE = 10.0
ROWS = 2  # of the input of the experiment


class SharedHooks:
    """The hooks by which a set's caches keep the rows of stream 0 alone, and projections of keys and values see them.

    Args:
        state: of the model.
        streams: the set.
    """

    def __init__(self, state: ParScaleState, streams: StreamSet) -> None:
        self.state = state
        self.streams = streams
        self.hooks: list[Any] = []
        self.parameters: dict[type, list[str]] = {}  # for each class of layers, the parameter names of its forward

    def attach(self, projections: dict[nn.Module, bool]) -> None:
        """Hooks the attention layers, and those of the projections that can be given fewer rows.

        Args:
            projections: as `find_projections` found them.
        """
        for layer in registered_layers(self.state.backbone):
            self.parameters[type(layer)] = argument_names(layer)
            self.hooks.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
        for module in (module for module, narrowed in projections.items() if narrowed):
            self.hooks += [module.register_forward_pre_hook(self._narrow), module.register_forward_hook(self._repeat)]

    def detach(self) -> None:
        """Removes the hooks."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before an attention layer: its cache keeps the rows of stream 0."""
        call = self.state.call
        if call.in_flight is not self.streams or call.passes is not None:
            return None
        names = self.parameters[type(module)][: len(args)]
        arguments = by_name(names, args, kwargs)
        name = next((name for name, value in arguments.items() if isinstance(value, Cache)), None)
        if name is None:
            return None
        cache = arguments[name]
        if isinstance(cache, EncoderDecoderCache):  # of a decoder that also has cross-attention
            cache = cache.self_attention_cache
        arguments[name] = SharedCache(cache, self.streams.num_streams)
        return tuple(arguments.pop(name) for name in names), arguments

    def _running(self, states: torch.Tensor) -> int:
        """How many streams the pass runs; 1 where it is none of this set, and where narrowing costs more than it saves.

        That is a step of one token: it reads the weights of the projection whatever the number of rows.
        """
        call = self.state.call
        if call.in_flight is not self.streams or (states.ndim == 3 and states.shape[1] == 1):
            return 1
        return self.streams.num_streams - (call.passes is not None)  # stream 0 had its pass

    def _narrow(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before a projection: the rows of the first stream that runs, `(B, S, H)`."""
        running = self._running(args[0])
        return None if running == 1 else (args[0][: args[0].shape[0] // running], *args[1:])

    def _repeat(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        """After it: as many rows as the layer goes on with, `(R, S, ...)`."""
        running = self._running(args[0])
        return None if running == 1 else torch.cat([output] * running)


def find_projections(state: ParScaleState, streams: StreamSet) -> dict[nn.Module, bool]:
    """The linear layers whose outputs for streams 1 to P - 1 are never read; none if there is any doubt.

    Args:
        state: of the model.
        streams: a set of it, whose parameters may not be there yet.

    Returns:
        For each, whether it can be given stream 0's rows alone.
    """
    whole = all(layer.mesh is None for layer in state.layers)  # heads in pieces on several devices are left alone
    modules: dict[nn.Module, bool] = {
        module: name in NARROWED
        for layer in registered_layers(state.backbone)
        for name in (*NARROWED, *BEHIND_THE_CACHE)
        if isinstance(module := getattr(layer, name, None), nn.Linear | Conv1D)
    }
    if not whole or not modules or input_device(state.model).type == "meta":
        return {}
    with examining(state), state.calls.choosing(streams), state.calls.unmixed():
        try:
            if not _are_not_read(state, streams, modules):
                return {}
            _try_narrow(state, streams, modules)
        except Exception as error:  # whatever the backbone does with noise, or with keys of fewer rows
            if is_machine_error(error):
                raise
            return {}
    return modules


def _are_not_read(state: ParScaleState, streams: StreamSet, modules: Iterable[nn.Module]) -> bool:
    """Whether noise on the rows of streams 1 to P - 1 changes nothing."""

    def disturb(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        first = output[: output.shape[0] // streams.num_streams]
        return torch.cat([first, torch.randn_like(output[len(first) :]) * NOISE])

    expected = _read(state, 3)
    with contextlib.ExitStack() as disturbed:
        for module in modules:
            disturbed.enter_context(module.register_forward_hook(in_this_thread(disturb)))
        return torch.equal(_read(state, 3), expected)


def _try_narrow(state: ParScaleState, streams: StreamSet, modules: dict[nn.Module, bool]) -> None:
    """Runs the backbone with a cache while the layers see fewer rows; what it raises is passed on."""
    hooks, name = SharedHooks(state, streams), cache_argument(state.backbone)
    assert name is not None
    try:
        hooks.attach(modules)
        cache = DynamicCache(config=state.backbone.config)
        for length in (2, 1):
            _read(state, length, use_cache=True, **{name: cache})
    finally:
        hooks.detach()


def _read(state: ParScaleState, length: int, **arguments: Any) -> torch.Tensor:
    words = ordinary_tokens(state.model, ROWS * length)
    ids = torch.tensor(words, device=input_device(state.model)).view(ROWS, length)
    return state.backbone(input_ids=ids, **({"use_cache": False} | arguments))[0]
