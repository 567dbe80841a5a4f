"""The settings that the result of a run depends on, by which a resumed run is compared with the one before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from parscale.checkpoints.description import describe
from parscale.checkpoints.models import find_tokenizer, require_tokenizer
from parscale.checkpoints.texts.documents import Named, Source
from parscale.checkpoints.texts.files import printable_path
from parscale.checkpoints.training.digests import checkpoint_digest
from parscale.checkpoints.training.new_model import NewModel
from parscale.checkpoints.training.packing import Encoder
from parscale.checkpoints.training.settings import LearningRates, TrainSettings
from parscale.checkpoints.training.training_data import Sources
from parscale.config import PREFIX


def reported_settings(
    checkpoint: str,
    settings: TrainSettings,
    rates: LearningRates,
    bf16: bool,
    length: int,
    steps: int,
) -> dict[str, Any]:
    """The settings that the result of a run depends on, without digests of the contents that it reads."""
    return {
        "checkpoint": checkpoint,
        "trains": settings.trains,
        "data": [_name(source) for source in settings.data],
        "text_column": settings.text_column,
        "streaming": settings.streaming,
        "eval_tokens": settings.eval_tokens,
        "eval_data": {name: _name(source) for name, source in settings.eval_data.items()},
        "tokens": steps * settings.batch_size * length,
        "steps": steps,
        "sequence_length": length,
        "batch_size": settings.batch_size,
        **rates.reported(),
        "weight_decay": settings.weight_decay,
        "warmup": settings.warmup,
        "decay": settings.decay,
        "lora_rank": settings.lora_rank,
        "quantize": settings.quantize,
        "bf16": bf16,
        "seed": settings.seed,
    }


def settings_known_before_reading(
    checkpoint: str | NewModel, settings: TrainSettings, before: Mapping[str, Any]
) -> dict[str, Any]:
    """What is known of a run's settings before anything is read, of those that its weights depend on."""
    length = settings.sequence_length or before["sequence_length"]
    steps = (settings.tokens or before["tokens"]) // (settings.batch_size * length)
    unknown = LearningRates(0.0, 0.0, 0.0)
    optional = {name: getattr(settings, name) for name in (*unknown.reported(), "bf16")}
    known = reported_settings(str(checkpoint), settings, unknown, False, length, steps)
    known = {key: value for key, value in known.items() if key not in (*optional, "eval_data", "eval_tokens")}
    return known | {key: value for key, value in optional.items() if value is not None}


def settings_known_after_reading(
    checkpoint: str | NewModel, settings: TrainSettings, before: Mapping[str, Any]
) -> dict[str, Any]:
    """The other settings, known once the checkpoint's files and the data are read again.

    Raises:
        ValueError: the data or the checkpoint is missing or damaged.
        OSError: the checkpoint does not exist.
    """
    new = checkpoint if isinstance(checkpoint, NewModel) else None
    transform = describe(str(checkpoint))["transform"] if new is None else new.streams.transform
    rates = settings.rates(transform or PREFIX, new=new is not None)
    encode = Encoder(tokenizer_of(checkpoint))
    data = Sources(replace(settings, eval_data={})).packed(encode, before["sequence_length"])
    return {
        "checkpoint_digest": checkpoint_digest(checkpoint),
        "data_digest": data.digest,
        "steps": data.steps,
        **rates.reported(),
    }


def tokenizer_of(checkpoint: str | NewModel) -> PreTrainedTokenizerBase:
    """The tokenizer of what is trained; a `ValueError` without one."""
    if isinstance(checkpoint, NewModel):
        return checkpoint.find_tokenizer()
    return require_tokenizer(find_tokenizer(checkpoint), checkpoint)


def _name(source: Named) -> str:
    return source.name if isinstance(source, Source) else printable_path(source)
