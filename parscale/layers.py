"""Finds the attention layers of a model, and what their keys and values look like, by running it on two tokens."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from parscale.attention import AttentionConfig
from parscale.errors import UnsupportedModelError
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
    decoder = model.get_decoder()
    if not isinstance(decoder, nn.Module) or decoder is model or model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head behind a backbone of its own: streams are mixed "
            "between the two. Use the causal-LM class of this architecture (AutoModelForCausalLM)."
        )
    return decoder


def own_config(model: PreTrainedModel) -> None:
    """Gives the model a configuration object that no other model holds.

    Every module of the model that held the old object, or one of its parts, holds the new one.
    """
    old = model.config
    new = copy.deepcopy(old)
    replacement = {id(old): new}
    for name in getattr(old, "sub_configs", {}):
        if isinstance(getattr(old, name, None), PreTrainedConfig):
            replacement[id(getattr(old, name))] = getattr(new, name)
    for module in model.modules():
        held = module.__dict__.get("config")
        if id(held) in replacement:
            module.config = replacement[id(held)]  # type: ignore[assignment]


def attach_attention(state: ParScaleState) -> None:
    """Shows the attention layers their configuration through :class:`AttentionConfig`, and records the layers.

    Raises:
        UnsupportedModelError: no layer takes its attention function from transformers' registry.
    """
    names = {id(module): name for name, module in state.model.named_modules()}
    candidates = [module for module in state.decoder.modules() if _looks_up_attention(module)]
    for module in candidates:
        module.config = AttentionConfig(module.config, state)  # type: ignore[assignment, arg-type]
    found: dict[int, AttentionLayer] = {}

    def record(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> None:
        layer = AttentionLayer(
            names[id(module)], module, key.shape[1], key.shape[-1], value.shape[-1], key.dtype, key.device
        )
        found.setdefault(id(module), layer)

    if candidates:
        state.recorder = record
        try:
            _run_two_tokens(state)
        finally:
            state.recorder = None
    for module in candidates:
        if id(module) not in found:
            module.config = module.config.backbone  # type: ignore[union-attr, assignment]
    if not found:
        raise UnsupportedModelError(
            f"No attention was found in {type(state.model).__name__}: none of its layers takes its attention function "
            "from transformers' registry (ALL_ATTENTION_FUNCTIONS), where streams put their prefix. Models without "
            "keys and values (Mamba, RWKV), and old ones with attention code of their own (Bloom, Falcon, GPT-J), "
            "cannot be wrapped."
        )
    state.layers = list(found.values())


def detach_attention(state: ParScaleState) -> None:
    """Gives the attention layers their plain configuration back."""
    for layer in state.layers:
        layer.module.config = layer.module.config.backbone  # type: ignore[union-attr, assignment]


def _looks_up_attention(module: nn.Module) -> bool:
    if isinstance(module, PreTrainedModel) or not isinstance(module.__dict__.get("config"), PreTrainedConfig):
        return False
    return any(hasattr(sys.modules.get(cls.__module__), "ALL_ATTENTION_FUNCTIONS") for cls in type(module).__mro__)


def _run_two_tokens(state: ParScaleState) -> None:
    with backbone_only(state):
        ids = torch.zeros(1, 2, dtype=torch.long, device=input_device(state.model))
        hidden = state.decoder(input_ids=ids, use_cache=False)[0]  # (1, 2, H)
    state.hidden_size, state.hidden_dtype, state.hidden_device = hidden.shape[-1], hidden.dtype, hidden.device


def input_device(model: nn.Module) -> torch.device:
    """Where the model takes its token ids: the device of its embeddings, or the one that they are fetched to."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    hook = getattr(embeddings, "_hf_hook", None)
    if getattr(hook, "execution_device", None) is not None:
        return torch.device(hook.execution_device)
    return next(embeddings.parameters()).device


@contextlib.contextmanager
def backbone_only(state: ParScaleState) -> Iterator[None]:
    """The plain backbone, in eval mode, without gradients and without touching the caller's random state."""
    training = [module for module in state.decoder.modules() if module.training]
    active, state.active = state.active, None
    experts = contextlib.nullcontext()
    if any(p.is_meta for p in state.decoder.parameters(recurse=True)):
        experts = _experts_without_data_dependence(state.model)
    try:
        state.decoder.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=cuda_devices(state.model)), experts:
            yield
    finally:
        state.active = active
        for module in training:
            module.training = True


def cuda_devices(model: nn.Module) -> list[int]:
    """Indices of the CUDA devices that hold parameters of the model."""
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


@contextlib.contextmanager
def _experts_without_data_dependence(model: nn.Module) -> Iterator[None]:
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
    return any(
        isinstance(module, nn.Embedding) and ("position" in name or name.split(".")[-1] == "wpe")
        for name, module in decoder.named_modules()
    )
