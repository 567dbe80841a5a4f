"""Loads a checkpoint for training: what is trained and what is frozen, an adapter, a quantized backbone."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Conv1D

import parscale.auto  # makes AutoModelForCausalLM read full checkpoints
from parscale import load
from parscale.checkpoints.description import describe
from parscale.checkpoints.models import load_any, require_language_model, require_merged
from parscale.checkpoints.training.new_model import NewModel
from parscale.checkpoints.training.settings import EVERYTHING, LORA, ONLY_STREAMS
from parscale.checkpoints.training.weight_files import has_streams
from parscale.compat.bitsandbytes import four_bits_with_gradients
from parscale.format.folders import PLAIN, STREAMS_CONFIG, STREAMS_ONLY, Checkpoint, backbone_location
from parscale.format.models import load_plain_model
from parscale.format.pretrained import read_pretrained
from parscale.streams.naming import part_of


def check_trainable(checkpoint: str | NewModel, trains: str) -> None:
    """Refuses what cannot be trained and saved again as a checkpoint of the same kind, before a weight is read.

    Raises:
        ValueError: a checkpoint without streams or a new model with a frozen backbone, streams only with one that
            trains, an adapter that is not merged, or a configuration from which no model can be made.
        OSError: there is no such checkpoint.
    """
    if isinstance(checkpoint, NewModel):
        if trains != EVERYTHING:
            raise ValueError(
                "A new model's backbone has random weights, so that all of it has to train; leave --freeze-backbone "
                "and --lora-rank out."
            )
        checkpoint.check()
        return
    require_merged(checkpoint)
    kind = Checkpoint(checkpoint).kind()
    if kind == STREAMS_ONLY and trains != ONLY_STREAMS:
        raise ValueError(
            f"{checkpoint} holds streams only, so its backbone cannot be trained; add --freeze-backbone, or train a "
            "full checkpoint (parscale convert without --streams-only)."
        )
    if trains == ONLY_STREAMS and describe(checkpoint)["num_streams"] == 1:
        raise ValueError(
            f"{checkpoint} has no streams, so with a frozen backbone there is nothing to train; add streams with "
            "parscale convert, or omit --freeze-backbone."
        )


def open_for_training(
    checkpoint: str | NewModel,
    *,
    trains: str,
    lora_rank: int | None = None,
    quantize: str | None = None,
    keep_dtype: bool = False,
    gradient_checkpointing: bool = False,
    attn_implementation: str | None = None,
) -> Any:
    """Loads a checkpoint in train mode, with trainable parameters in float32.

    Args:
        checkpoint: a folder or a name on the Hugging Face Hub, with streams or without, or a new model.
        trains: `"streams"`, `"lora"` or `"everything"`.
        lora_rank: of the adapter.
        quantize: None, `"int8"` or `"nf4"`, for the frozen backbone.
        keep_dtype: keep a frozen backbone in its saved dtype; otherwise it is in float32 too.
        gradient_checkpointing: compute activations again in the backward pass.
        attn_implementation: as in `from_pretrained`.

    Returns:
        The wrapped or plain model, with an adapter on it for `"lora"`.

    Raises:
        ValueError: the checkpoint is damaged or not a causal language model, a required package is missing, or no
            layer is large enough for an adapter of this rank.
        OSError: there is no such checkpoint.
    """
    dtype = None if keep_dtype and trains != EVERYTHING else torch.float32
    options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    if isinstance(checkpoint, NewModel):
        model = checkpoint.make(dtype, **options)
    elif quantize is not None:
        model = _quantized(checkpoint, quantize, dtype, options)
    else:
        model = load_any(checkpoint, dtype=dtype, **options)
    require_language_model(model, str(checkpoint))
    if trains != EVERYTHING and has_streams(model):  # as it is loaded, all but inactive sets trains
        model.freeze_backbone()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if gradient_checkpointing:  # renamed in transformers 5.23
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    if trains == LORA:
        model = _with_adapter(model, lora_rank or 8)
    return model.train()


def _with_adapter(model: Any, rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("An adapter needs the package peft: pip install 'parscale[peft]'.") from error
    _check_rank(model, rank)
    adapted = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return adapted


def rank_with_parameters(model: Any, parameters: int) -> int | None:
    """The rank at which an adapter of a model has about so many parameters; at most the largest that a weight has.

    Args:
        model: a causal language model, with streams or without.
        parameters: how many.

    Returns:
        The rank, at least 1; None if no layer of the model gets an adapter.
    """
    if not (sizes := _adapted(model)):
        return None
    return max(1, min(round(parameters / sum(map(sum, sizes))), max(map(min, sizes))))


def _adapted(model: Any) -> list[tuple[int, int]]:
    """Inputs and outputs of the layers that get an adapter: all but the head and the streams' own."""
    head = model.get_output_embeddings()
    return [
        (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else (layer.nx, layer.nf)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer is not head and part_of(f"{name}.") is None
    ]


def _check_rank(model: Any, rank: int) -> None:
    """Refuses an adapter of a rank that no weight under it has."""
    ranks = [min(sizes) for sizes in _adapted(model)]
    if ranks and rank > max(ranks):
        raise ValueError(
            f"lora_rank is {rank:,}, and no weight of {type(model).__name__} has a rank above {max(ranks):,}: give at "
            "most that, or train the whole backbone, without lora_rank."
        )


def _quantized(checkpoint: str, quantize: str, dtype: torch.dtype | None, options: dict[str, Any]) -> Any:
    options = options | {"quantization_config": _quantization(quantize), "dtype": dtype or "auto"}
    if torch.cuda.is_available():
        options["device_map"] = {"": torch.cuda.current_device()}
    with four_bits_with_gradients() if quantize == "nf4" else contextlib.nullcontext():
        return _load_quantized(checkpoint, options)


def _load_quantized(source: str, options: dict[str, Any]) -> Any:
    checkpoint = Checkpoint(source)
    kind = checkpoint.kind()
    if kind == PLAIN:
        return load_plain_model(checkpoint, AutoModelForCausalLM, **options)[0]
    if kind != STREAMS_ONLY:
        return read_pretrained(AutoModelForCausalLM, source, **options)
    backbone = backbone_location(checkpoint, checkpoint.read_json(STREAMS_CONFIG))
    if backbone is None:
        raise ValueError(f"{source} does not name its backbone, so it cannot be quantized.")
    if Checkpoint(backbone).kind() == STREAMS_ONLY:
        raise ValueError(f"The backbone {backbone} of {source} is itself a streams-only folder.")
    model = _load_quantized(backbone, options)
    if has_streams(model):
        model = parscale.unwrap(model)
    return load(source, backbone=model)


def _quantization(quantize: str) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    try:
        if quantize == "int8":
            from torchao.quantization import Int8WeightOnlyConfig

            return TorchAoConfig(Int8WeightOnlyConfig())
        import bitsandbytes  # noqa: F401

        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    except ImportError as error:
        package = "torchao" if quantize == "int8" else "bitsandbytes"
        raise ValueError(f"quantize={quantize!r} needs the package {package}: pip install {package}.") from error
