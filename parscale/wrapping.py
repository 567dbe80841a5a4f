"""``wrap`` and ``unwrap``: a Hugging Face model gets P streams in place, and loses them again."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from parscale import methods
from parscale.attention.discovery import attach_attention, detach_attention, held_configs, measure, own_config
from parscale.auto import register_backbone
from parscale.compat.deepspeed import is_partitioned
from parscale.compat.torch import take_parameter, unwatch_replicas
from parscale.compat.transformers import REORDER_CACHE, STATIC_CACHE_SHAPE
from parscale.config import FIELDS, PREFIX, SET_PATTERN, ParScaleConfig
from parscale.distributed.offloading import keep, let_go
from parscale.distributed.parallel import (
    check_takes_parameters,
    distribute_streams,
    share_random_state,
    tensor_parallel_mesh,
)
from parscale.hooks.recomputation import stop_recomputing
from parscale.hooks.surroundings import undisturbed
from parscale.hooks.trial import try_whole_model
from parscale.integrations.peft import extend_peft
from parscale.integrations.trl import keep_reference
from parscale.kernels.dispatch import Impl, check_impl
from parscale.streams import choosing
from parscale.streams.aggregator import Aggregator
from parscale.streams.state import DEFAULT, ParScaleState, StreamSet
from parscale.transforms.inits import check_calibration, default_init, initialize

MEMBERS: dict[str, Callable[..., Any]] = {
    "add_streams": methods.add_streams,
    "set_streams": choosing.set_streams,
    "use_streams": choosing.use_streams,
    "freeze_backbone": methods.freeze_backbone,
    "print_trainable_parameters": methods.print_trainable_parameters,
    "stream_report": methods.stream_report,
    "save_pretrained": methods.save_pretrained,
    "save_streams": methods.save_streams,
    "load_streams": methods.load_streams,
    REORDER_CACHE: methods.reorder_cache,
    STATIC_CACHE_SHAPE: methods.static_cache_init_shape,
    "init_continuous_batching": methods.init_continuous_batching,
}


def wrap(
    model: Any,
    num_streams: int | ParScaleConfig = 4,
    *,
    prefix_length: int = 48,
    smoothing: float = 0.1,
    init: str | None = None,
    seed: int | None = None,
    calibration: torch.Tensor | None = None,
    transform: str = PREFIX,
    rank: int = 8,
    kernels: Impl = "auto",
) -> Any:
    """Gives a Hugging Face model P parallel streams, in place.

    The model keeps its class, its methods and its names; ``generate``, ``Trainer``, ``save_pretrained``, PEFT and
    ``torch.compile`` work as before. Its dtype, its device and whether it trains stay its own. The set of streams made
    here is called ``"default"``. Method: Chen et al., arXiv 2505.10475.

    Args:
        model: a ``transformers.PreTrainedModel``: a causal language model, also with images; an encoder of text or
            images; two such encoders side by side; or an encoder with a decoder (see
            :mod:`parscale.streams.backbones`). It may be split by tensor parallelism, or partitioned by ZeRO-3 when it
            was loaded; then every process calls this. FSDP shards it afterwards. It is run on two tokens or on an
            image, without streams and with them.
        num_streams: P, or a :class:`ParScaleConfig` in place of all numbers. 1 adds nothing.
        prefix_length: T, learned key/value pairs per stream in each attention layer.
        smoothing: epsilon in ``w * (1 - epsilon) + epsilon / P``.
        init: ``"documents"``, ``"context"`` or ``"random"``; see :mod:`parscale.transforms.inits`. By default the
            first for causal language models, and the last where there are no texts to start from.
        seed: seed of the draws; ``None`` draws from torch's state.
        calibration: token ids ``(P, T)`` that all but ``"random"`` read; without it the backbone samples them.
        transform: what makes the streams differ: ``"prefix"``, ``"prompt"`` (also for models without keys and values)
            or ``"lora"``; see :mod:`parscale.transforms`.
        rank: of ``"lora"``.
        kernels: how the operations that streams add run: ``"auto"`` by Triton kernels on CUDA and ROCm devices,
            ``"reference"`` by plain torch everywhere, ``"fused"`` by the kernels or not at all. Not saved.

    Returns:
        The same object.

    Raises:
        ValueError: a number out of range, a ``calibration`` that does not fit, or a model that is wrapped already.
        UnsupportedModelError: not a Hugging Face model, one in which the transform has no place, such as a prefix
            where no attention was found, or one that as a whole does not return what it should with streams. The model
            is then what it was.
    """
    config = ParScaleConfig.from_arguments(
        num_streams,
        prefix_length=prefix_length,
        smoothing=smoothing,
        init=init,
        seed=seed,
        transform=transform,
        rank=rank,
    )
    configs, choices = held_configs(model), _choices(model)
    state = None
    try:
        state = attach(model, kernels)
        add(state, DEFAULT, config, calibration=calibration)
        choosing.set_streams(model, DEFAULT)
    except BaseException:
        if state is not None:
            detach(state)
        for module, held in configs:
            module.config = held
        for module, children, chosen in choices:
            for name, child in children.items():
                setattr(module, name, child)
            if chosen is not None:
                module.attention_type = chosen
        raise
    return model


def _choices(model: Any) -> list[tuple[Any, dict[str, Any], Any]]:
    """Each module with its children, which BigBird puts others in the place of when it first reads a short text."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [(module, dict(module.named_children()), vars(module).get("attention_type")) for module in modules]


def unwrap(model: Any) -> Any:
    """Takes all streams off a wrapped model, in place; its logits are the backbone's to the last bit.

    Returns:
        The same object.

    Raises:
        ValueError: the model is not wrapped.
    """
    detach(state_of(model))
    return model


def state_of(model: Any) -> ParScaleState:
    """The streams of a wrapped model.

    Raises:
        ValueError: the model is not wrapped.
    """
    state = getattr(model, "parscale", None)
    if not isinstance(state, ParScaleState) or state.model is not model:
        raise ValueError(f"This {type(model).__name__} is not wrapped: parscale.wrap(model) gives it streams.")
    return state


@undisturbed()
def attach(model: Any, kernels: Impl = "auto") -> ParScaleState:
    """Everything of wrapping but the tensors: hooks, members, a configuration of its own.

    Args:
        model: as :func:`wrap`.
        kernels: as :func:`wrap`.

    Raises:
        ValueError: the model is wrapped already, or an unknown ``kernels``.
        UnsupportedModelError: as :func:`wrap`.
    """
    if isinstance(getattr(model, "parscale", None), ParScaleState):
        raise ValueError(
            f"This {type(model).__name__} is wrapped already: add_streams(name, ...) adds a further set of streams, "
            "parscale.unwrap(model) takes them off."
        )
    check_impl(kernels, "kernels")
    state = ParScaleState(model, kernels)
    try:
        own_config(model)
        _anchor_name(model)
        check_takes_parameters(model)
        _decompress(model)
        attach_attention(state)
        _add_members(state)
        extend_peft()
        keep_reference()
        register_backbone(model.config.model_type)
    except BaseException:
        detach(state)
        raise
    return state


def _add_members(state: ParScaleState) -> None:
    """Gives the model what a wrapped one has beside its class's own."""
    model = state.model
    model.parscale = state
    for member, function in MEMBERS.items():
        setattr(model, member, functools.partial(function, model))
    choosing.show_num_streams()
    if state.encoder is not None and model.can_generate():
        model.generate = functools.partial(methods.generate, model)
    state.hooks.append(model.register_load_state_dict_pre_hook(state.load_into_active))


def _anchor_name(model: Any) -> None:
    """Makes the path of the backbone's folder absolute: streams that are saved name it, maybe from elsewhere."""
    name = model.config.name_or_path
    if name and os.path.isdir(name):
        model.config.name_or_path = os.path.abspath(name)


def _decompress(model: Any) -> None:
    """What compressed-tensors does when a model is first called; here its backbone is called before it."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and hasattr(model, "ct_decompress_hook"):
        quantizer.compressor.decompress_model(model)


def detach(state: ParScaleState) -> None:
    """Undoes :func:`attach`, and removes all sets."""
    model = state.model
    if state.adapters is not None:
        state.adapters.drop()
    for streams in list(state.sets.values()):
        remove(state, streams)
    for hook in state.hooks:
        hook.remove()
    detach_attention(state)
    stop_recomputing(state.parts)
    for part in state.parts:
        unwatch_replicas(part)
    for member in ("parscale", *MEMBERS):
        model.__dict__.pop(member, None)
    if state.encoder is not None:
        model.__dict__.pop("generate", None)
    for field in FIELDS:
        model.config.__dict__.pop(field, None)


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
        state: of the model, from :func:`attach` or :func:`state_of`.
        name: of the set; letters, digits, ``-`` and ``_``.
        config: its numbers.
        calibration: as :func:`wrap`.
        tensors: its values by their released names in the model (as :meth:`ParScaleState.tensors` gives them), from
            a checkpoint; without them the set starts by ``config.init``.

    Raises:
        ValueError: a name that is taken or not a name; tensors missing, too many or of another shape.
    """
    if not isinstance(name, str) or not re.fullmatch(SET_PATTERN, name):
        raise ValueError(f"A set of streams is named by letters, digits, '-' and '_', got {name!r}.")
    if name in state.sets:
        raise ValueError(f"There is a set of streams {name!r} already: choose another name, or unwrap the model.")
    streams = StreamSet(state, name, dataclasses.replace(config, init=config.init or default_init(state, config)))
    check_calibration(state, streams, calibration)
    check_takes_parameters(state.model)
    mesh = tensor_parallel_mesh(state.model)
    if config.transform != PREFIX and (mesh is not None or any(map(is_partitioned, state.model.parameters()))):
        raise ValueError(
            f"A model that is split by tensor parallelism or ZeRO-3 takes transform={PREFIX!r} only, got "
            f"{config.transform!r}."
        )
    if config.num_streams > 1:
        measure(state)
        streams.transform.places()  # says so if there are none
    if mesh is not None and config.seed is None:
        share_random_state(mesh)
    state.sets[name] = streams
    try:
        _make_parameters(state, streams)
        if tensors is None:
            initialize(state, streams, calibration)
        else:
            fill(state, streams, tensors)
        if mesh is not None:
            distribute_streams(state, streams, mesh)
        if config.num_streams > 1:
            streams.transform.attach()
            if tensors is None:  # those of a checkpoint ran when it was made
                try_whole_model(state, streams)
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
    if state.default is streams:
        state.default = None
    for block in state.blocks.innermost:
        if block.chosen is streams:
            block.chosen = None
    if streams.num_streams > 1:
        streams.transform.detach()
        for place in streams.transform.places():
            take_parameter(place.module, streams.own_name(place.name))
            let_go(place.module, streams.own_name(place.name))
    for part in state.mixed:
        if hasattr(part, streams.aggregator_name):
            delattr(part, streams.aggregator_name)
    state.sets.pop(streams.name, None)


def _make_parameters(state: ParScaleState, streams: StreamSet) -> None:
    P = streams.num_streams
    if P == 1:
        return
    for place in streams.transform.places():
        zeros = torch.zeros(place.shape, dtype=place.dtype, device=place.device)
        place.module.register_parameter(streams.own_name(place.name), nn.Parameter(zeros))
        keep(place.module, streams.own_name(place.name))
    for part, (size, dtype, device) in zip(state.mixed, state.hidden, strict=True):
        aggregator = Aggregator(P, size, streams.config.smoothing, dtype=dtype, device=device)
        aggregator.train(part.training)
        part.add_module(streams.aggregator_name, aggregator)


def fill(state: ParScaleState, streams: StreamSet, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives a set its values, by their released names.

    Raises:
        ValueError: tensors missing, too many or of another shape.
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
            "They belong to a backbone of another size, or the checkpoint is damaged."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
