"""Finds the attention layers of a model, and what their keys and values look like, by running it on two tokens."""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from parscale.attention import AttentionConfig
from parscale.errors import UnsupportedModelError
from parscale.parallel import each_module_gathered, tensor_parallel_mesh
from parscale.streams import AttentionLayer, ParScaleState


def check_model(model: Any) -> nn.Module:
    """The backbone whose rows are copied: ``model.get_decoder()``.

    Raises:
        UnsupportedModelError: not a Hugging Face model, or one without a separate backbone.
    """
    if not isinstance(model, PreTrainedModel):
        given = model.__name__ if isinstance(model, type) else type(model).__name__
        raise UnsupportedModelError(
            f"wrap takes a loaded Hugging Face model (a transformers.PreTrainedModel), got {given}: "
            "load one with AutoModelForCausalLM.from_pretrained(...) first; with PEFT, wrap before get_peft_model."
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder with a decoder: streams are for models that only decode, whose "
            "whole input passes through one backbone (AutoModelForCausalLM)."
        )
    decoder = model.get_decoder()  # finds it by the names of attributes
    if decoder is model or not isinstance(decoder, PreTrainedModel):  # under another name, or that of the head
        children = [child for child in model.children() if isinstance(child, PreTrainedModel)]
        decoder = children[0] if len(children) == 1 else decoder
    if not isinstance(decoder, nn.Module) or decoder is model or model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head behind a backbone of its own: streams are mixed "
            "between the two. Use the causal-LM class of this architecture (AutoModelForCausalLM)."
        )
    return decoder


def held_configs(model: Any) -> list[tuple[nn.Module, Any]]:
    """Each module that holds a configuration, and the object that it holds."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [(module, module.__dict__["config"]) for module in modules if "config" in module.__dict__]


def own_config(model: PreTrainedModel) -> None:
    """Gives the model a configuration object that no other model holds.

    Every module of the model that held the old object, or one of its parts, holds the new one.
    """
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module, held in held_configs(model):
        if isinstance(held, PreTrainedConfig) and id(held) in copies:  # the object itself, or a part of it
            module.config = copies[id(held)]


def attach_attention(state: ParScaleState) -> None:
    """Shows the attention layers their configuration through :class:`AttentionConfig`, and records the layers.

    Raises:
        UnsupportedModelError: no layer takes its attention function from transformers' registry.
    """
    names = {id(module): name for name, module in state.model.named_modules()}
    candidates = [module for module in dict.fromkeys(_modules(state.decoder)) if _looks_up_attention(module)]
    for module in candidates:
        module.config = AttentionConfig(module.config, state, type(module))
    found: dict[int, AttentionLayer] = {}
    seen: list[tuple[nn.Module, torch.Tensor]] = []

    def record(module: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        lender = next((other for other, keys in seen if _same_keys(keys, key)), None)
        if lender is not None:  # a layer that borrows another's keys (Gemma 3n, Gemma 4) borrows its prefix
            module.config.borrow(lender)
            return
        seen.append((module, key))
        found[id(module)] = AttentionLayer(
            names[id(module)], module, key.shape[1], key.shape[-1], value.shape[-1], key.dtype, key.device
        )

    if candidates:
        state.recorder = record
        try:
            _run_two_tokens(state)
        finally:
            state.recorder = None
    for module in candidates:
        if id(module) not in found and module.config.lender is None:
            module.config = module.config.backbone
    if not found:
        raise UnsupportedModelError(
            f"No attention was found in {type(state.model).__name__}: none of its layers takes its attention function "
            "from transformers' registry (ALL_ATTENTION_FUNCTIONS), where streams put their prefix. Models without "
            "keys and values (Mamba, RWKV), and old ones with attention code of their own (Bloom, Falcon, GPT-J), "
            "cannot be wrapped."
        )
    state.layers = list(found.values())
    mesh = tensor_parallel_mesh(state.model)
    if mesh is not None:
        _count_heads_of_all_devices(state, mesh)


def _count_heads_of_all_devices(state: ParScaleState, mesh: Any) -> None:
    """Finds the layers whose heads are split over the mesh, by comparing them with the same model in one piece."""
    config = copy.deepcopy(state.model.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        model: Any = type(state.model)(config)
    undivided = ParScaleState(model, model.get_submodule(state.decoder_name), state.decoder_name)
    attach_attention(undivided)
    heads = {layer.name: layer.key_heads for layer in undivided.layers}
    for layer in state.layers:
        if layer.key_heads != heads[layer.name]:
            layer.key_heads, layer.mesh = heads[layer.name], mesh


def detach_attention(state: ParScaleState) -> None:
    """Gives the attention layers their plain configuration back."""
    for module in state.decoder.modules():
        if isinstance(module.__dict__.get("config"), AttentionConfig):
            module.config = module.config.backbone


def number_of_attention_layers(state: ParScaleState) -> int:
    """How many layers attend to a prefix, their own or one that they borrow."""
    return sum(isinstance(module.__dict__.get("config"), AttentionConfig) for module in state.decoder.modules())


def _same_keys(keys: torch.Tensor, other: torch.Tensor) -> bool:
    if keys.device == other.device:
        return keys is other
    return keys.shape == other.shape and torch.equal(keys.cpu(), other.cpu())  # handed on to the next device


def _modules(backbone: nn.Module) -> Iterator[Any]:
    """Its modules, but for those of a further model in it with a head of its own.

    Blt cuts a text into patches by what such a model foresees: no gradient comes back from there.
    """
    yield backbone
    for child in backbone.children():
        if not (isinstance(child, PreTrainedModel) and child.get_output_embeddings() is not None):
            yield from _modules(child)


def _looks_up_attention(module: nn.Module) -> bool:
    if isinstance(module, PreTrainedModel) or not isinstance(module.__dict__.get("config"), PreTrainedConfig):
        return False
    return any(hasattr(sys.modules.get(cls.__module__), "ALL_ATTENTION_FUNCTIONS") for cls in type(module).__mro__)


def _run_two_tokens(state: ParScaleState) -> None:
    device = input_device(state.model)
    # transformers looks at positions and masks as if they had values, but not at those of fake tensors
    fake: Any = FakeTensorMode(allow_non_fake_inputs=True) if device.type == "meta" else contextlib.nullcontext()
    with backbone_only(state), fake:
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        hidden = state.decoder(input_ids=ids, use_cache=False)[0]  # (1, 2, H)
    state.hidden_size, state.hidden_dtype, state.hidden_device = hidden.shape[-1], hidden.dtype, hidden.device


def input_device(model: Any) -> torch.device:
    """Where the model takes its token ids: the device of its embeddings, or the one that they are fetched to."""
    embeddings = model.get_input_embeddings()
    device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device(device)
    return next(embeddings.parameters()).device


@contextlib.contextmanager
def backbone_only(state: ParScaleState) -> Iterator[None]:
    """The plain backbone, in eval mode, without gradients and without touching the caller's random state.

    Nothing is compiled for it: FlexAttention, which transformers compiles for each length, takes seconds to do so.
    """
    training = [module for module in state.decoder.modules() if module.training]
    active, state.active = state.active, None
    experts: Any = contextlib.nullcontext()
    if any(p.is_meta for p in state.decoder.parameters(recurse=True)):
        experts = _experts_without_data_dependence(state.model)
    try:
        state.decoder.eval()
        own_draws = torch.random.fork_rng(cuda_devices(state.model))
        uncompiled = torch.compiler.set_stance("force_eager")
        pieces = each_module_gathered(state.model)
        with torch.no_grad(), own_draws, experts, uncompiled, pieces, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            yield
    finally:
        state.active = active
        for module in training:
            module.training = True


def cuda_devices(model: Any) -> list[int]:
    """Indices of the CUDA devices that hold parameters of the model."""
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


@contextlib.contextmanager
def _experts_without_data_dependence(model: Any) -> Iterator[None]:
    """On the meta device a mixture of experts runs in the form whose shapes do not depend on the routing."""
    previous = getattr(model.config, "_experts_implementation", None)
    if previous is None:
        yield
        return
    model.config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        model.config._experts_implementation = previous


def has_learned_positions(decoder: nn.Module) -> bool:
    """Whether positions are an embedding table (GPT-2, OPT), which has no entry for a negative position."""
    for child in decoder.children():
        if "text" in getattr(child, "input_modalities", "text") and has_learned_positions(child):
            return True  # positions of images or sounds are another thing
    return any(
        isinstance(child, nn.Embedding) and ("position" in name or name == "wpe")
        for name, child in decoder.named_children()
    )
