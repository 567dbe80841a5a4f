"""The small model recycled with a variant of one cache, of which `variants.py` has the attention.

The package does not save such a model, so its `train` cannot go on with one: here the same steps are taken in a loop of
their own (the data, their order, the rates and the schedule of `parscale train`), which a killed run starts again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from loop import DEVICE, autocast, is_of_streams
from torch import nn
from transformers import AutoModelForCausalLM, default_data_collator, get_wsd_schedule
from variants import SharedVariant, Streams, with_one_cache

from parscale import wrap
from parscale.checkpoints import Document, TrainSettings, open_checkpoint, pack_documents, small_model_path

CLOSED = -4.0  # where gates start: the window of own keys counts 0.02 of the others, since a backbone exists


def open_variant(
    variant: str, checkpoint: Path, streams: int, first_text: torch.Tensor, *, frozen: bool
) -> SharedVariant:
    """A variant as its training begins.

    Args:
        variant: its name.
        checkpoint: streams with one cache, started from texts.
        streams: P.
        first_text: what the prefix of stream 0 starts from, where there is one, `(1, T)`.
        frozen: whether the backbone stays as it is.
    """
    model, _ = open_checkpoint(str(checkpoint))
    model = model.float()
    if frozen:
        model.freeze_backbone()
    else:
        model.requires_grad_(True)
    result = with_one_cache(variant, model, streams)
    with torch.no_grad():
        for gate in result.gates_of_streams:
            gate.fill_(CLOSED)
        if result.first_prefixes:
            plain = AutoModelForCausalLM.from_pretrained(small_model_path(), dtype=torch.float32)
            one = wrap(plain, 2, prefix_length=first_text.shape[1], calibration=first_text.expand(2, -1))
            for prefix, layer in zip(result.first_prefixes, one.get_decoder().layers, strict=True):
                prefix.copy_(torch.stack([layer.self_attn.prefix_k[:1], layer.self_attn.prefix_v[:1]]))
    return result.to(DEVICE)


def fit(variant: Streams, tokenizer: Any, documents: Sequence[Document], settings: TrainSettings) -> None:
    """Trains a variant in place, on the batches and at the rates that `parscale train` takes with these settings."""
    model, size = variant.model, settings.batch_size
    blocks = pack_documents(documents, tokenizer, settings.sequence_length)
    steps = settings.tokens // (size * settings.sequence_length)
    assert steps * size <= len(blocks), "the documents are read once"
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(settings.seed * 1_000_003)).tolist()
    names = [(name, parameter) for name, parameter in variant.named_parameters() if parameter.requires_grad]
    rates, groups = settings.rates("prefix"), []
    for name, parameter in names:
        of_streams = rates.aggregator if "aggregate_layer" in name else rates.streams
        groups.append({"params": [parameter], "lr": of_streams if is_of_streams(name) else rates.backbone})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = get_wsd_schedule(
        optimizer,
        num_warmup_steps=round(settings.warmup * steps),
        num_decay_steps=round(settings.decay * steps),
        num_training_steps=steps,
        decay_type="linear",
    )
    model.train()
    for step in range(steps):
        rows = [blocks[index] for index in order[step * size : (step + 1) * size]]
        batch = {name: part.to(DEVICE) for name, part in default_data_collator(rows).items()}
        with autocast():
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_([parameter for _, parameter in names], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
