"""Adds sets of streams to a model and removes them: parameters, initial values, and the hooks of their transform."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from parscale.attention.discovery import measure
from parscale.compat.deepspeed import is_partitioned
from parscale.config import PREFIX, SET_PATTERN, STREAMS_OFF, ParScaleConfig
from parscale.distributed.offloading import keep_on_device, let_go
from parscale.distributed.parallel import (
    check_takes_parameters,
    distribute_parameter,
    share_random_state,
    tensor_parallel_mesh,
)
from parscale.hooks.surroundings import undisturbed
from parscale.hooks.trial import try_whole_model
from parscale.streams.aggregator import Aggregator
from parscale.streams.sets import StreamSet
from parscale.streams.state import ParScaleState
from parscale.transforms import make_set
from parscale.transforms.inits import check_calibration, check_texts, default_init, initialize

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@undisturbed()
def add(
    state: ParScaleState,
    name: str,
    config: ParScaleConfig,
    *,
    calibration: torch.Tensor | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> StreamSet:
    """Adds a set of streams, inactive and frozen.

    Args:
        state: of the model, from `parscale.wrapping`.
        name: the set's name; letters, digits, `-` and `_`, but not `"off"`.
        config: the configuration of the set.
        calibration: as in `parscale.wrap`.
        tensors: its values from a checkpoint, by their released names in the model (as `ParScaleState.tensors` gives
            them); without them `config.init` says how the set starts.

    Raises:
        ValueError: the name is taken or invalid; tensors are missing, unknown or of another shape.
    """
    _check_name(state, name)
    streams = make_set(state, name, dataclasses.replace(config, init=config.init or default_init(state, config)))
    if tensors is None:  # streams of a checkpoint have started already
        check_texts(state, streams)
    check_calibration(state, streams, calibration)
    _check_parallel(state, streams)
    if streams.num_streams > 1:
        measure(state)
        streams.transform.parameter_specs()  # raises an error if there are none
    state.sets[name] = streams
    try:
        if streams.num_streams > 1:
            _make_parameters(state, streams)
            _give_values(state, streams, calibration, tensors)
            streams.transform.add_hooks()
            streams.transform.try_out()
            if tensors is None:  # streams of a checkpoint were tried when they were made
                try_whole_model(state, streams)
        elif tensors is not None:
            fill(state, streams, tensors)  # one stream has no tensors
        if state.adapters is not None:
            state.adapters.cover(streams)
    except BaseException:
        remove(state, streams)
        raise
    for parameter in state.tensors(streams).values():
        parameter.requires_grad_(False)
    return streams


def remove(state: ParScaleState, streams: StreamSet) -> None:
    """Removes a set and its parameters."""
    if streams.num_streams > 1:
        streams.transform.detach()
        for spec in streams.transform.parameter_specs():
            name = streams.own_name(spec.name)
            if hasattr(spec.module, name):
                delattr(spec.module, name)
            let_go(spec.module, name)
    for part in state.mixed:
        if hasattr(part, streams.aggregator_name):
            delattr(part, streams.aggregator_name)
    state.sets.pop(streams.name, None)


def _check_name(state: ParScaleState, name: object) -> None:
    if not isinstance(name, str) or not re.fullmatch(SET_PATTERN, name):
        raise ValueError(f"A set of streams takes a name of letters, digits, '-' and '_', got {name!r}.")
    if name == STREAMS_OFF:
        raise ValueError(
            f"A set of streams cannot be called {name!r}, by which the command line means the plain backbone: choose "
            "another name."
        )
    if name in state.sets:
        raise ValueError(f"A set of streams {name!r} exists already: choose another name, or unwrap the model.")


def _check_parallel(state: ParScaleState, streams: StreamSet) -> None:
    """Raises an error if a model on several devices does not support this set."""
    check_takes_parameters(state.model)
    transform = streams.config.transform
    if transform == PREFIX:
        return
    if tensor_parallel_mesh(state.model) is not None or any(map(is_partitioned, state.model.parameters())):
        raise ValueError(
            f"A model that is split by tensor parallelism or ZeRO-3 takes transform={PREFIX!r} only, got {transform!r}."
        )


def _make_parameters(state: ParScaleState, streams: StreamSet) -> None:
    """Adds the set's parameters, filled with zeros, and an aggregator for each part whose streams are mixed."""
    for spec in streams.transform.parameter_specs():
        zeros = torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device)
        spec.module.register_parameter(streams.own_name(spec.name), nn.Parameter(zeros))
        keep_on_device(spec.module, streams.own_name(spec.name))
    for part, (size, dtype, device) in zip(state.mixed, state.hidden, strict=True):
        aggregator = Aggregator(streams.num_streams, size, streams.config.smoothing, dtype=dtype, device=device)
        aggregator.train(part.training)
        part.add_module(streams.aggregator_name, aggregator)


def _give_values(
    state: ParScaleState,
    streams: StreamSet,
    calibration: torch.Tensor | None,
    tensors: Mapping[str, torch.Tensor] | None,
) -> None:
    """Sets the initial values of a new set, on all devices of a tensor-parallel model; arguments as in `add`."""
    mesh = tensor_parallel_mesh(state.model)
    if mesh is not None and streams.config.seed is None:
        share_random_state(mesh)
    if tensors is None:
        initialize(state, streams, calibration)
    else:
        fill(state, streams, tensors)
    if mesh is not None:
        _distribute(state, streams, mesh)


def _distribute(state: ParScaleState, streams: StreamSet, mesh: DeviceMesh) -> None:
    """Replicates a new set's parameters, in place, on every process of a tensor-parallel model."""
    for layer in state.layers:
        for name in (streams.key_name, streams.value_name):
            distribute_parameter(layer.module, name, mesh, by_heads=layer.mesh is not None)
    for aggregator in state.aggregators(streams):
        for module in aggregator.modules():
            for name in [name for name, _ in module.named_parameters(recurse=False)]:
                distribute_parameter(module, name, mesh)


def fill(state: ParScaleState, streams: StreamSet, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copies values into a set, by their released names.

    Raises:
        ValueError: tensors are missing, unknown or of another shape.
    """
    own = state.tensors(streams)
    problems = [f"{name} is missing" for name in sorted(own.keys() - tensors.keys())]
    problems += [f"{name} is unknown" for name in sorted(tensors.keys() - own.keys())]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"The streams do not fit this {type(state.model).__name__}: {'; '.join(problems[:3])}{more}. "
            "They belong to a backbone of another class or size, or the checkpoint is damaged."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
