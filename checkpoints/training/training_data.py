"""The data of a run: opens sources, packs them into rows, counts the steps, and takes digests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase

from parscale.checkpoints.texts.documents import Document, Source
from parscale.checkpoints.texts.order import in_turn
from parscale.checkpoints.texts.sources import LOOKED_AT, open_sources
from parscale.checkpoints.training.digests import streamed_digest
from parscale.checkpoints.training.held_out import texts_to_measure
from parscale.checkpoints.training.packing import (
    Block,
    Blocks,
    Encoder,
    Shuffled,
    Streamed,
    documents_of,
    pack,
    too_few,
)
from parscale.checkpoints.training.settings import TrainSettings


@dataclass(frozen=True)
class TrainingData:
    """Packed text for training and evaluation.

    Attributes:
        rows: what to train on, in its order.
        steps: how many there are.
        digest: of the rows; of streamed ones, of their beginning.
        measured: what to measure on while training, by name.
        held_out: the documents of the same texts that are measured at the end.
        datasets: the names of what came from the Hugging Face Hub.
    """

    rows: Shuffled | Streamed
    steps: int
    digest: str
    measured: dict[str, Blocks]
    held_out: dict[str, list[Document]]
    datasets: list[str]


class Sources:
    """The sources of a run, opened and checked, so that errors are reported before a model is loaded.

    Args:
        settings: the run's settings.

    Raises:
        ValueError: a source is missing, damaged or empty.
    """

    def __init__(self, settings: TrainSettings) -> None:
        column = settings.text_column
        self.settings = settings
        self.data = open_sources(settings.data, text_column=column, streaming=settings.streaming, seed=settings.seed)
        texts = open_sources([*settings.eval_data.values()], text_column=column)
        self.eval_data = dict(zip(settings.eval_data, texts, strict=True))

    def check_chats(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Puts the first chats of each source through the chat template.

        Raises:
            ValueError: there is none, or it refuses one of them.
        """
        encode = Encoder(tokenizer)
        for source in (*self.data, *self.eval_data.values()):
            chats = [example for example in source.beginning(LOOKED_AT) if not isinstance(example[1], str)]
            for _ in encode(chats):
                pass

    def packed(self, encode: Encoder, length: int) -> TrainingData:
        """Their text, packed into rows of `length` tokens.

        Raises:
            ValueError: there is too little text, a row that is measured holds none, or the tokenizer belongs to another
                model.
        """
        rows, steps, digest = _training_rows(self.data, encode, length, self.settings)
        measured = {
            name: _measured_blocks(source, encode, length, self.settings) for name, source in self.eval_data.items()
        }
        held_out = texts_to_measure(self.eval_data, encode.tokenizer, length, self.settings.eval_tokens)
        datasets = [source.dataset for source in self.data if source.dataset is not None]
        return TrainingData(rows, steps, digest, measured, held_out, datasets)


def _training_rows(
    sources: Sequence[Source], encode: Encoder, length: int, settings: TrainSettings
) -> tuple[Shuffled | Streamed, int, str]:
    """The training data, its number of steps, and a digest of it; for streamed data, of its beginning."""
    per_step = settings.batch_size * length
    if settings.streaming:
        assert settings.tokens is not None
        steps = _steps(settings.tokens, per_step, settings, length)
        beginning = Blocks(islice(pack(encode(in_turn(sources)), length), settings.batch_size), length)
        if not len(beginning):
            raise too_few(sources, encode, length)
        named = [os.fspath(each) for each in settings.data if not isinstance(each, Source)]
        digest = streamed_digest(beginning.fingerprint(), named)
        return Streamed(list(sources), encode, length, steps * settings.batch_size), steps, digest
    blocks = Blocks(pack(encode(documents_of(sources)), length), length)
    if not len(blocks):
        raise too_few(sources, encode, length)
    tokens = len(blocks) * length if settings.tokens is None else settings.tokens
    steps = _steps(tokens, per_step, settings, length)
    return Shuffled(blocks, steps * settings.batch_size, settings.seed), steps, blocks.fingerprint()


def _steps(tokens: int, per_step: int, settings: TrainSettings, length: int) -> int:
    if tokens < per_step:
        raise ValueError(
            f"{tokens:,} tokens are fewer than the {per_step:,} of one step ({settings.batch_size} sequences of "
            f"{length:,} tokens); give more tokens, or a smaller batch or sequence."
        )
    return tokens // per_step


def _measured_blocks(source: Source, encode: Encoder, length: int, settings: TrainSettings) -> Blocks:
    padding = encode.tokenizer.eos_token_id or 0
    blocks: list[Block] = []
    for block in pack(encode(source), length, padding=padding):
        blocks.append(block)
        if len(blocks) * length >= settings.eval_tokens:
            break
    if not any((block[1] > 0).any() for block in blocks):
        raise ValueError(f"{source.name} holds no document of two tokens, so no loss can be measured on it.")
    return Blocks(blocks, length)
