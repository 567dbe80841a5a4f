"""How a checkpoint is post-trained: the settings of `parscale train`."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from parscale.checkpoints.texts.documents import Named, Source

ONLY_STREAMS, LORA, EVERYTHING = "streams", "lora", "everything"  # what is trained

STREAMS_RATES = {"prefix": 1e-2, "prompt": 1e-3, "lora": 3e-3}  # by what makes streams differ
AGGREGATOR_RATE = 1e-3  # at most: at the rate of prefixes it settles on one stream within a hundred steps
BACKBONE_RATE, LORA_RATE, NEW_RATE = 3e-5, 2e-4, 1e-3
LARGEST_SEED = 2**32 - 1  # that NumPy takes


class LearningRates(NamedTuple):
    """The peak learning rates of a run."""

    streams: float
    aggregator: float
    backbone: float  # or of the adapter in its place

    def reported(self) -> dict[str, float]:
        """By the names of the settings."""
        return {
            "streams_learning_rate": self.streams,
            "aggregator_learning_rate": self.aggregator,
            "learning_rate": self.backbone,
        }


@dataclass(frozen=True)
class TrainSettings:
    """How to post-train a checkpoint.

    In Python, `data` and the values of `eval_data` may also be paths, or a `Source` with documents in memory.

    Attributes:
        data: Training text: text files, files of rows (.json, .jsonl, .csv, .tsv, .parquet, .arrow), folders, or
            datasets of the Hugging Face Hub, NAME or NAME:CONFIGURATION. Rows may hold chats in place of text, of
            which the assistant's turns are learned: `messages`, or `prompt` and `completion`.
        eval_data: Texts to measure on, each by a name of its own, under which the metrics have it.
        text_column: What holds the text in rows of data.
        streaming: Read data while training, not beforehand; needs `tokens`. Sources take turns, a document each; files
            that are given by name are one source. The seed shuffles files, and documents within 10,000 of each source.
        tokens: Tokens to train on; rounded down to whole steps. If more than the data holds, it is read again.
            Default: the data once.
        sequence_length: Tokens in a sequence. Default: 1024, or fewer if the model takes fewer.
        batch_size: Sequences in an optimizer step; over all devices.
        micro_batch_size: Sequences that a device takes at once. Default: its whole share of the batch.
        learning_rate: Peak learning rate of all that trains but the streams. With a frozen backbone: of the streams,
            unless `streams_learning_rate` is given too; then of the control `alone`. Default: 3e-5, of an adapter 2e-4,
            of a new model 1e-3; with a frozen backbone, see `streams_learning_rate`.
        streams_learning_rate: Peak learning rate of the streams. Default: 1e-2, of prompts 1e-3, of low-rank
            differences 3e-3, in a new model that of the rest.
        aggregator_learning_rate: Peak learning rate of the aggregator. Default: that of the streams, but at most 1e-3;
            in a new model that of the rest.
        weight_decay: Weight decay of the backbone's matrices: a factor of their learning rate.
        warmup: Share of the steps in which the learning rate rises; then it is constant.
        decay: Share of the steps at the end in which the learning rate falls to zero.
        freeze_backbone: Train only the streams.
        lora_rank: Rank of an adapter that is trained with the streams, in place of the backbone; at the end it is
            merged into the backbone. At most the rank of the largest weight.
        quantize: Type of a frozen backbone's weights during training: `int8` (torchao) or `nf4` (bitsandbytes).
        bf16: Compute in bfloat16 under autocast, with float32 weights where they are trained. Default: on GPUs that
            support it.
        gradient_checkpointing: Compute activations again in the backward pass: less memory, more time.
        compile: Run the model through `torch.compile`.
        attn_implementation: Attention implementation, such as sdpa, flash_attention_2 or flex_attention.
            Flash-attention needs `bf16`, and a `micro_batch_size` of 1 to keep packed documents apart.
        eval_every: Steps between measurements. Default: a tenth of the run.
        eval_tokens: Maximum number of tokens to measure of each text.
        save_every: Steps between checkpoints. Default: a tenth of the run.
        keep_checkpoints: How many checkpoints stay.
        report_to: Trackers of the Trainer, such as tensorboard, wandb, trackio or mlflow.
        seed: Seed of the order of the text and of what else is drawn.

    Raises:
        ValueError: a setting has the wrong type, a number is out of range, or two settings exclude each other.
    """

    data: Sequence[Named]
    eval_data: Mapping[str, Named] = field(default_factory=dict)
    text_column: str = "text"
    streaming: bool = False
    tokens: int | None = None
    sequence_length: int | None = None
    batch_size: int = 8
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    streams_learning_rate: float | None = None
    aggregator_learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.02
    decay: float = 0.2
    freeze_backbone: bool = False
    lora_rank: int | None = None
    quantize: str | None = None
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    attn_implementation: str | None = None
    eval_every: int | None = None
    eval_tokens: int = 50_000
    save_every: int | None = None
    keep_checkpoints: int = 2
    report_to: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_texts()
        for name in ("tokens", "micro_batch_size", "lora_rank", "eval_every", "save_every"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), 1)
        for name in ("batch_size", "eval_tokens", "keep_checkpoints"):
            _check_whole(name, getattr(self, name), 1)
        if self.sequence_length is not None:
            _check_whole("sequence_length", self.sequence_length, 2)
        _check_whole("seed", self.seed, 0)
        if self.seed > LARGEST_SEED:
            raise ValueError(f"seed is {self.seed}, and must be at most {LARGEST_SEED}.")
        for name in ("learning_rate", "streams_learning_rate", "aggregator_learning_rate"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name))
        for name in ("weight_decay", "warmup", "decay"):
            _check_number(name, getattr(self, name))
        if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1 and self.warmup + self.decay <= 1):
            raise ValueError(
                f"warmup is {self.warmup} and decay {self.decay}; they are shares of the run, and together at most 1."
            )
        if self.freeze_backbone and self.lora_rank is not None:
            raise ValueError(
                "freeze_backbone trains only the streams, lora_rank an adapter too; give only one of them."
            )
        if self.quantize not in (None, "int8", "nf4"):
            raise ValueError(f"quantize is {self.quantize!r}, and must be 'int8' or 'nf4'.")
        if self.quantize is not None and self.trains == EVERYTHING:
            raise ValueError("A quantized backbone cannot train; give freeze_backbone or lora_rank with quantize.")
        if self.streaming and self.tokens is None:
            raise ValueError("Streamed data has no length; set tokens, the number to train on.")

    def _check_texts(self) -> None:
        """Refuses what is no list or mapping of texts, or no list of trackers."""
        named = (str, os.PathLike, Source)
        for name, kinds in (("data", named), ("report_to", str)):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                example = f", such as [{value!r}]" if isinstance(value, kinds) else ""
                raise ValueError(f"{name} is {value!r}, and must be a list of names{example}.")
            for each in value:
                if not isinstance(each, kinds):
                    raise ValueError(f"{name} has {each!r} in it, and must be a list of names.")
        if not self.data:
            raise ValueError("No training data was given; name at least one file, folder or dataset.")
        if not isinstance(self.eval_data, Mapping):
            example = f", such as {{'held-out': {self.eval_data!r}}}" if isinstance(self.eval_data, named) else ""
            raise ValueError(f"eval_data is {self.eval_data!r}, and must give each text a name{example}.")
        for text, source in self.eval_data.items():
            if not (isinstance(text, str) and text and isinstance(source, named)):
                raise ValueError(f"eval_data calls {source!r} {text!r}; give a text by a name that is not empty.")

    @property
    def trains(self) -> str:
        """`"streams"`, `"lora"` or `"everything"`."""
        return ONLY_STREAMS if self.freeze_backbone else LORA if self.lora_rank is not None else EVERYTHING

    def rates(self, transform: str, *, new: bool = False) -> LearningRates:
        """The peak learning rates.

        Args:
            transform: what makes the streams differ.
            new: whether the model begins with random weights.

        Returns:
            Those of the streams, of their aggregator, and of all other parameters.
        """
        of_streams, of_aggregator, rest = self.streams_learning_rate, self.aggregator_learning_rate, self.learning_rate
        if new:
            rest = NEW_RATE if rest is None else rest
            of_streams = rest if of_streams is None else of_streams
            return LearningRates(of_streams, rest if of_aggregator is None else of_aggregator, rest)
        if of_streams is None:
            given = self.learning_rate if self.trains == ONLY_STREAMS else None
            of_streams = STREAMS_RATES[transform] if given is None else given
        if rest is None:
            rest = LORA_RATE if self.trains == LORA else BACKBONE_RATE
        if of_aggregator is None:
            of_aggregator = min(of_streams, AGGREGATOR_RATE)
        return LearningRates(of_streams, of_aggregator, rest)


def _check_whole(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}, and must be an integer of at least {minimum}.")
    if value < minimum:
        raise ValueError(f"{name} is {value}, and must be at least {minimum}.")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, numbers.Real) or not (math.isfinite(value) and float(value) >= 0):
        raise ValueError(f"{name} is {value!r}, and must be a number of at least 0.")
