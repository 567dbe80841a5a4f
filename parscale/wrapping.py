"""`wrap` and `unwrap`: add P streams to a Hugging Face model in place, and remove them."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from parscale import methods
from parscale.attention.discovery import attach_attention, detach_attention
from parscale.compat.conversion import spare_from_conversion
from parscale.compat.torch import is_watched
from parscale.compat.transformers import REORDER_CACHE, STATIC_CACHE_SHAPE, TOKEN_TIMES, show_on_models
from parscale.config import DEFAULT_SET, FIELDS, OWN, PREFIX, ParScaleConfig, as_config, takes_fields
from parscale.distributed.parallel import check_takes_parameters
from parscale.format.architectures import register_backbone
from parscale.format.folders import hub_name
from parscale.hooks.adding import add, remove
from parscale.hooks.backbone import BackboneHooks, unhook
from parscale.hooks.surroundings import undisturbed
from parscale.integrations.accelerate import keep_texts_whole
from parscale.integrations.peft import extend_peft
from parscale.integrations.trl import keep_reference
from parscale.kernels.dispatch import Impl, check_impl
from parscale.streams import choosing
from parscale.streams.naming import is_of_streams
from parscale.streams.state import ParScaleState, find_state

M = TypeVar("M")  # the caller's class of model, which does not change

MEMBERS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        methods.add_streams,
        choosing.set_streams,
        choosing.use_streams,
        methods.freeze_backbone,
        methods.stream_parameters,
        methods.print_trainable_parameters,
        methods.stream_report,
        methods.stream_losses,
        methods.save_pretrained,
        methods.save_streams,
        methods.load_streams,
        methods.init_continuous_batching,
    )
}
GENERATOR_MEMBERS: dict[str, Callable[..., Any]] = {  # also of the models inside that generate
    REORDER_CACHE: methods.reorder_cache,
    STATIC_CACHE_SHAPE: methods.static_cache_init_shape,
    TOKEN_TIMES: methods.token_times,
}


@takes_fields
def wrap(
    model: M,
    num_streams: int | ParScaleConfig = 4,
    *,
    prefix_length: int = 48,
    smoothing: float = 0.1,
    init: str | None = None,
    seed: int | None = None,
    calibration: torch.Tensor | None = None,
    transform: str = PREFIX,
    rank: int = 8,
    kv: str = OWN,
    kernels: Impl = "auto",
) -> M:
    """Adds P parallel streams to a Hugging Face model, in place.

    The model keeps its class, its methods and its names; `generate`, `Trainer`, `save_pretrained`, PEFT and
    `torch.compile` work as before. Its dtype, device and training mode do not change. The set of streams made here is
    called `"default"`. Method: Chen et al., arXiv 2505.10475.

    Args:
        model: a `transformers.PreTrainedModel`: a causal language model, also with images; an encoder of text or
            images; two parallel encoders; or an encoder-decoder model. The final hidden states are mixed: before the
            pooling of an encoder, of each of two encoders, or of the decoder. It may be split by tensor parallelism, or
            partitioned by ZeRO-3 when it was loaded; then every process calls this. FSDP shards it afterwards. The
            model is run on small inputs, with and without streams.
        num_streams: P, or a `ParScaleConfig`, beside which no other field may be given. 1 adds nothing.
        prefix_length: as in `ParScaleConfig`.
        smoothing: as in `ParScaleConfig`.
        init: as in `ParScaleConfig`.
        seed: as in `ParScaleConfig`.
        calibration: token ids `(P, T)` that all inits but `"random"` read, or `(P - 1, T)` with shared keys and values;
            without it the backbone samples them.
        transform: as in `ParScaleConfig`.
        rank: as in `ParScaleConfig`.
        kv: as in `ParScaleConfig`.
        kernels: how the operations that streams add run: `"auto"` with Triton kernels on CUDA and ROCm devices,
            `"reference"` with plain torch everywhere, `"fused"` with the kernels or an error at the first call. Not
            saved.

    Returns:
        The same object.

    Raises:
        ValueError: a number is out of range, `calibration` does not fit, or the model is already wrapped, by itself or
            as a part of another model.
        UnsupportedModelError: it is not a Hugging Face model; the transform has no place in it, such as a prefix
            without attention; or the whole model does not return the right outputs with streams. The model is then
            unchanged.
    """
    config = as_config(num_streams, prefix_length, smoothing, init, seed, transform, rank, kv)
    with _restored_on_failure(model):
        state = attach(model, kernels)
        try:
            add(state, DEFAULT_SET, config, calibration=calibration)
            choosing.set_streams(model, DEFAULT_SET)
        except BaseException:
            detach(state)
            raise
    return model


@contextlib.contextmanager
def _restored_on_failure(model: object) -> Iterator[None]:
    """If this block fails, the model's configurations and its modules' children are restored.

    BigBird replaces children when it first reads a short text.
    """
    configs = _held_configs(model)
    modules = model.modules() if isinstance(model, nn.Module) else ()
    choices = [(module, dict(module.named_children()), vars(module).get("attention_type")) for module in modules]
    try:
        yield
    except BaseException:
        for module, held in configs:
            module.config = held
        for module, children, chosen in choices:
            for name, child in children.items():
                setattr(module, name, child)
            if chosen is not None:
                module.attention_type = chosen
        raise


def unwrap(model: M) -> M:
    """Removes all streams from a wrapped model, in place; its logits are the backbone's to the last bit.

    Parameters that `freeze_backbone` froze stay frozen: `model.requires_grad_(True)` trains them again.

    Args:
        model: a wrapped model.

    Returns:
        The same object.

    Raises:
        ValueError: the model is not wrapped.
    """
    detach(require_state(model))
    return model


def require_state(model: object) -> ParScaleState:
    """The state of a wrapped model.

    Raises:
        ValueError: the model is not wrapped.
    """
    state = find_state(model)
    if state is None or state.model is not model:
        raise ValueError(f"This {type(model).__name__} is not wrapped: parscale.wrap(model) gives it streams.")
    return state


@undisturbed()
def attach(model: Any, kernels: Impl = "auto") -> ParScaleState:
    """Does everything of `wrap` except for the tensors: hooks, methods, a separate configuration.

    Args:
        model: as in `wrap`.
        kernels: as in `wrap`.

    Raises:
        ValueError: the model is already wrapped, or `kernels` is unknown.
        UnsupportedModelError: as in `wrap`.
    """
    if find_state(model) is not None:
        raise ValueError(
            f"This {type(model).__name__} is wrapped already: add_streams(name, ...) adds another set of streams, "
            "load_streams(folder) a saved one, parscale.unwrap(model) removes them."
        )
    check_impl(kernels, "kernels")
    state = ParScaleState(model, kernels)
    _check_no_other_wrap(state)
    try:
        BackboneHooks(state).attach()
        _own_config(model)
        _anchor_name(model)
        state.made_from = hub_name(model.config.name_or_path)
        check_takes_parameters(model)
        _decompress(model)
        attach_attention(state)
        model.parscale = state
        for member, function in MEMBERS.items():
            setattr(model, member, _bound(function, model))
        for generator in state.generators:
            for member, function in GENERATOR_MEMBERS.items():
                setattr(generator, member, _bound(function, model, generator))
        show_on_models("num_streams", choosing.NumStreams())
        if model.can_generate():
            model.generate = _bound(methods.generate, model)
        extend_peft()
        keep_reference()
        keep_texts_whole()
        spare_from_conversion(is_of_streams)
        register_backbone(model.config.model_type)
    except BaseException:
        detach(state)
        raise
    return state


def _bound(function: Callable[..., Any], *first: Any) -> functools.partial[Any]:
    """The function with its first arguments and its docstring; unlike a method, it is pickled with its model."""
    bound = functools.partial(function, *first)
    bound.__doc__ = function.__doc__
    return bound


def _check_no_other_wrap(state: ParScaleState) -> None:
    """Checks that no other model, inside this one or around it, runs its streams on the same backbone.

    Both would store their parameters under the same names in the same layers.

    Raises:
        ValueError: another one does.
    """
    for part in state.parts:
        taken = next(filter(is_watched, part.modules()), None)
        if taken is not None:
            where = "is" if taken is state.model else f"has a {type(taken).__name__} inside that is"
            raise ValueError(
                f"This {type(state.model).__name__} {where} wrapped already, by itself or as a part of another model: "
                "add_streams(name, ...) on the model that was wrapped adds another set of streams, "
                "parscale.unwrap(model) removes them."
            )


def _held_configs(model: object) -> list[tuple[nn.Module, Any]]:
    """Each module that holds a configuration, and that object."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [(module, module.__dict__["config"]) for module in modules if "config" in module.__dict__]


def _own_config(model: PreTrainedModel) -> None:
    """Gives the model a configuration object that no other model holds.

    Every module that held the old object, or one of its parts, gets the new one. A quantizer's description of the
    weights stays the quantizer's own object, which changes with the weights.
    """
    quantization = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    copies: dict[int, Any] = {} if quantization is None else {id(quantization): quantization}
    copy.deepcopy(model.config, copies)
    for module, held in _held_configs(model):
        if isinstance(held, PreTrainedConfig) and id(held) in copies:  # the object itself, or a part of it
            module.config = copies[id(held)]


def _anchor_name(model: Any) -> None:
    """Makes the path of the backbone's folder absolute: saved streams name it, possibly from another folder."""
    name = model.config.name_or_path
    if name and os.path.isdir(name):
        model.config.name_or_path = os.path.abspath(name)


def _decompress(model: object) -> None:
    """Decompresses the weights, as compressed-tensors does in a model's first call: here its backbone runs earlier."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and hasattr(model, "ct_decompress_hook"):
        quantizer.compressor.decompress_model(model)


def detach(state: ParScaleState) -> None:
    """Undoes `attach`, and removes all sets."""
    model = state.model
    if state.adapters is not None:
        state.adapters.drop()
    for streams in list(state.sets.values()):
        remove(state, streams)
    unhook(state)
    detach_attention(state)
    for member in ("parscale", "generate", "last_mean_streams", *MEMBERS):
        model.__dict__.pop(member, None)
    for generator in state.generators:
        for member in GENERATOR_MEMBERS:
            generator.__dict__.pop(member, None)
    for field in FIELDS:
        model.config.__dict__.pop(field, None)
