"""Finds the attention layers of a model, and the shapes of their keys and values, by a short run."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from parscale.attention.cache_seam import attach_caches
from parscale.attention.registered import AttentionConfig, registered_layers
from parscale.compat.flash import flash_cannot_run
from parscale.compat.transformers import looks_up_attention, use_eager
from parscale.distributed.parallel import tensor_parallel_mesh
from parscale.errors import UnsupportedModelError
from parscale.streams.backbones import TRIAL_TOKENS, inner_modules, input_device
from parscale.streams.brief_runs import is_machine_error, one_line, run_briefly
from parscale.streams.calls import Recorder
from parscale.streams.layer_specs import AttentionLayer, Hidden
from parscale.streams.naming import is_of_streams
from parscale.streams.state import ParScaleState

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def attach_attention(state: ParScaleState) -> None:
    """Gives the attention layers an `AttentionConfig` as their configuration, and records them.

    In a part where no layer looks up its attention function in transformers' registry, layers that read a cache are
    hooked instead (`parscale.attention.cache_seam`). If the backbone has none either, `state.without_layers` holds the
    reason.

    Raises:
        UnsupportedModelError: streams do not run on this backbone.
    """
    names = {id(module): name for name, module in state.model.named_modules()}
    modules = dict.fromkeys(module for part in state.parts for module in inner_modules(part))
    candidates = [module for module in modules if _looks_up_attention(module)]
    for module in candidates:
        module.config = AttentionConfig(module.config, state, type(module))
    found: dict[int, AttentionLayer] = {}
    seen: list[tuple[nn.Module, torch.Tensor]] = []

    def record(module: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        lender = next((other for other, keys in seen if _same_keys(keys, key)), None)
        if lender is not None:  # a layer that uses another layer's keys (Gemma 3n, Gemma 4) also uses its prefix
            module.config.borrow(lender)
            return
        seen.append((module, key))
        found[id(module)] = AttentionLayer.of(names[id(module)], module, key, value)

    try:
        _run_recorded(state, record)
        for module in _over_depth(state, found.values()):
            del found[id(module)]
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise _as_unsupported(state, error) from error
    for module in candidates:
        if id(module) not in found and module.config.lender is None:
            module.config = module.config.original
    try:
        others = [part for part in state.parts if not any(id(module) in found for module in part.modules())]
        state.layers = [*found.values(), *attach_caches(state, others)]
    except UnsupportedModelError as error:
        state.without_layers = str(error)
    except Exception as error:
        state.without_layers = str(_as_unsupported(state, error))
    mesh = tensor_parallel_mesh(state.model)
    if mesh is not None:
        _count_heads_of_all_devices(state, mesh)


def _over_depth(state: ParScaleState, layers: Iterable[AttentionLayer]) -> list[nn.Module]:
    """The layers, found in a run on `TRIAL_TOKENS` tokens, whose tokens stand where heads would be (Inkling 2).

    Each token of such a layer attends to its own states in earlier layers, and there are as many "heads" as tokens. A
    layer with as many true heads keeps its number in a run on more tokens.
    """
    heads = {id(layer.module): layer.key_heads for layer in layers}
    over_depth: list[nn.Module] = []

    def compare(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        if key.shape[1] != heads.get(id(module), key.shape[1]) and module not in over_depth:
            over_depth.append(module)

    if TRIAL_TOKENS in heads.values():
        with state.calls.recording(compare):
            run_briefly(state, tokens=TRIAL_TOKENS + 1)
    return over_depth


def _as_unsupported(state: ParScaleState, error: Exception) -> UnsupportedModelError:
    """The error for a backbone that does not run by itself, made from the error that it raised.

    Raises:
        Exception: `error` itself, if the model is not its cause.
    """
    if is_machine_error(error):
        raise error
    remedy = "use another class of this architecture, if there is one."
    if flash_cannot_run(state.model, input_device(state.model)):  # an attention class that was chosen when it was built
        remedy = (
            "its layers are made for flash-attention, which runs on a GPU and in half precision only. Load it with "
            'attn_implementation="sdpa", or "eager" where transformers has no "sdpa" for it (GPT-J, GPT-Neo), or wrap '
            "it on the GPU, in half precision."
        )
    return UnsupportedModelError(
        f"The backbone of {type(state.model).__name__}, {type(state.backbone).__name__}, does not run by itself on two "
        f"tokens, an image of its size or silence, as streams need it to ({type(error).__name__}: {one_line(error)}): "
        + remedy
    )


def measure(state: ParScaleState) -> None:
    """Records dtype and device of keys and hidden states again, if those of the weights have changed.

    A model can be moved, cast, offloaded or given its memory (`to_empty`) after its layers were found.
    """
    if _weights(state) == state.measured:
        return
    layers = {id(layer.module): layer for layer in state.layers}

    def record(module: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        layer = layers.get(id(module))
        if layer is not None:  # a layer that uses another's keys is not recorded
            layer.dtype, layer.device = key.dtype, key.device

    _run_recorded(state, record)


def _run_recorded(state: ParScaleState, record: Recorder) -> None:
    """Records the keys of a brief run by `record`, and in the state its hidden states and the weights it ran with."""
    with state.calls.recording(record):
        state.hidden = [Hidden(x.shape[-1], x.dtype, x.device) for x in run_briefly(state)]
    state.measured = _weights(state)


def _weights(state: ParScaleState) -> list[tuple[torch.dtype, torch.device]]:
    """The dtype and device of the own parameters of each module that runs streams."""
    named = [item for part in state.parts for item in part.named_parameters()]
    return [(x.dtype, x.device) for name, x in named if not is_of_streams(name)]


def _count_heads_of_all_devices(state: ParScaleState, mesh: DeviceMesh) -> None:
    """Finds the layers whose heads are split over the mesh, by a comparison with the unsplit model."""
    config = copy.deepcopy(state.model.config)
    use_eager(config)
    with torch.device("meta"):
        model: Any = type(state.model)(config)
    undivided = ParScaleState(model)
    attach_attention(undivided)
    heads = {layer.module_name: layer.key_heads for layer in undivided.layers}
    for layer in state.layers:
        if layer.key_heads != heads[layer.module_name]:
            layer.key_heads, layer.mesh = heads[layer.module_name], mesh


def detach_attention(state: ParScaleState) -> None:
    """Restores the plain configuration of the attention layers."""
    for part in state.parts:
        for module in registered_layers(part):
            module.config = module.config.original


def has_layers_without_keys(state: ParScaleState) -> bool:
    """Whether some layers of the backbone attend to no prefix, neither their own nor that of another layer."""
    number = len(registered_layers(state.backbone)) or len(state.layers)
    return number < state.model.config.get_text_config().num_hidden_layers


def _same_keys(keys: torch.Tensor, other: torch.Tensor) -> bool:
    if keys.device == other.device:
        return keys is other
    return keys.shape == other.shape and torch.equal(keys.cpu(), other.cpu())  # moved to the next device


def _looks_up_attention(module: nn.Module) -> bool:
    if isinstance(module, PreTrainedModel) or not isinstance(module.__dict__.get("config"), PreTrainedConfig):
        return False
    return looks_up_attention(type(module))
