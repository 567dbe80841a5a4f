"""The end of a run on held-out text: the trained model against the untouched backbone, by place in the document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from parscale.checkpoints.evaluation.paired_differences import (
    MIDDLES,
    Places,
    direction,
    first_documents,
    format_interval,
    middle_sentences,
    single_seed_entries,
)
from parscale.checkpoints.evaluation.places import evaluate_places, holds_tokens_to_score
from parscale.checkpoints.models import load_any
from parscale.checkpoints.texts.documents import Document, Source, text_documents
from parscale.streams.state import find_state

TRAINED, UNTOUCHED, UNTRAINED = "trained", "untouched", "untrained"
NOT_TRAINED = {UNTOUCHED: "untouched backbone", UNTRAINED: "streams before training"}
"""Titles of what a trained model is compared with besides its controls."""
LEAST_WINDOW = 4
Texts = Mapping[str, Sequence[Document]]


def texts_to_measure(
    sources: Mapping[str, Source], tokenizer: PreTrainedTokenizerBase, window: int, tokens: int
) -> dict[str, list[Document]]:
    """Of each text that holds tokens to score, the documents that are measured; see `first_documents`.

    Chats are left out: they are measured while training, on what the assistant says.
    """
    documents = {name: text_documents(source) for name, source in sources.items()}
    texts = {name: first_documents(found, tokenizer, window, tokens) for name, found in documents.items()}
    return {name: documents for name, documents in texts.items() if holds_tokens_to_score(tokenizer, documents)}


def measure_places(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Texts, window: int, batch_size: int
) -> dict[str, Places]:
    """A model's loss by text and place; it runs on a GPU if there is one."""
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return {
        name: evaluate_places(
            model,
            tokenizer,
            documents,
            sequence_length=max(window, LEAST_WINDOW),
            middles=MIDDLES,
            batch_size=batch_size,
        )
        for name, documents in texts.items()
    }


def measure_untouched(
    checkpoint: str, tokenizer: PreTrainedTokenizerBase, texts: Texts, window: int, batch_size: int
) -> dict[str, Places]:
    """The same of the backbone that a checkpoint has, without its streams."""
    model = load_any(checkpoint)
    if find_state(model) is not None:
        model.set_streams(None)
    return measure_places(model, tokenizer, texts, window, batch_size)


def against_untouched(
    trained: str,
    checkpoint: str,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    *,
    window: int,
    batch_size: int,
    tokens: int,
) -> list[dict[str, Any]]:
    """The trained model against the untouched backbone.

    Args:
        trained: the folder of the trained model.
        checkpoint: what it was trained from.
        tokenizer: of both.
        texts: held-out documents, by the text's name.
        window: tokens in a window.
        batch_size: windows in a batch.
        tokens: how many it was trained on.

    Returns:
        An entry for each text and place, as
        `parscale.checkpoints.evaluation.paired_differences.single_seed_entries` makes them.
    """
    if not texts:
        return []
    measured = measure_places(load_any(trained), tokenizer, texts, window, batch_size)
    untouched = measure_untouched(checkpoint, tokenizer, texts, window, batch_size)
    entries = []
    for text in texts:
        entries += single_seed_entries(
            TRAINED, UNTOUCHED, text, {TRAINED: measured[text], UNTOUCHED: untouched[text]}, tokens
        )
    return entries


def sentences(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The trained model against the untouched backbone in words, in the middle of each text."""

    def say(text: str, held: list[Any]) -> str:
        entry = held[0]
        return f"In the middle of {text}, against the untouched backbone: {direction(entry)}, {format_interval(entry)}."

    return middle_sentences(entries, TRAINED, [UNTOUCHED], say)
