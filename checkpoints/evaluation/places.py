"""The loss of a causal language model by document, at the beginning of documents and in their middle.

At the beginning of a document a model lacks context and gains from any prefix, but most tokens of most texts lie in the
middle. So a gain is measured in both places, with the same context for every model:

- The beginning is the first window of a document. Before it comes the token that begins a text, if the tokenizer adds
  one itself, else the token that ends a text, else nothing. Every token after it is scored.
- The middle is up to four windows of the document, spread evenly after the first. The second half of each is scored, so
  that half a window of real text comes before every scored token. If the tokenizer adds a token before every text,
  these windows have it too.

A document that is too short for a middle has only a beginning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parscale.checkpoints.evaluation.text_loss import (
    DocumentLoss,
    Evaluation,
    Window,
    batches_of,
    checked_length,
    evaluating,
    perplexity_of,
    summed_losses,
)
from parscale.checkpoints.texts.documents import Document
from parscale.checkpoints.texts.token_ids import encode, vocabulary_of

BEGINNING, MIDDLE = "beginning", "middle"
PLACES = (BEGINNING, MIDDLE)


@dataclass(frozen=True)
class _Scored(Window):
    """A window, its place, and the index of its first scored token."""

    place: str
    first: int


def evaluate_places(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    sequence_length: int = 512,
    middles: int = 4,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[str, Evaluation]:
    """Measures a model's loss on documents by place, with its active streams or as the plain backbone.

    Args:
        model: a causal language model; it runs on its own device and in its own dtype. Losses are summed in float64.
        tokenizer: its tokenizer.
        documents: pairs of a name and a text.
        sequence_length: tokens in a window, at least 4 and at most the number of the model's positions.
        middles: maximum number of windows from the middle of a document.
        batch_size: windows in a batch.
        progress: whether to show a progress bar on standard error.

    Returns:
        `{"beginning": ..., "middle": ...}`; `"middle"` only if a document is long enough.

    Raises:
        ValueError: a number is out of range, no document has a token to score, or as in
            `parscale.checkpoints.texts.token_ids.encode`.
    """
    length = checked_length(model, sequence_length)
    if length < 4 or middles < 1 or batch_size < 1:
        raise ValueError(
            f"sequence_length is {length}, middles {middles} and batch_size {batch_size}; they must be at least 4, 1 "
            "and 1."
        )
    windows = _windows(documents, tokenizer, length, middles, vocabulary_of(model))
    if not windows:
        raise ValueError("No document has a token to score: give documents of two tokens or more.")
    sums: dict[tuple[str, int], list[float]] = {}
    counts: dict[tuple[str, int], int] = {}
    with evaluating(model), torch.inference_mode():
        for batch in batches_of(windows, batch_size, progress):
            losses = summed_losses(model, [(window.ids, window.first) for window in batch])
            for window, loss in zip(batch, losses, strict=True):
                key = (window.place, window.document)
                sums.setdefault(key, []).append(loss)
                counts[key] = counts.get(key, 0) + len(window.ids) - window.first
    result = {}
    for place in PLACES:
        found = [index for index in range(len(documents)) if (place, index) in sums]
        if not found:
            continue
        by_document = [
            DocumentLoss(
                documents[index][0], math.fsum(sums[place, index]) / counts[place, index], counts[place, index]
            )
            for index in found
        ]
        tokens = sum(document.tokens for document in by_document)
        loss = math.fsum(sum_ for index in found for sum_ in sums[place, index]) / tokens
        result[place] = Evaluation(loss, perplexity_of(loss), tokens, length, tuple(by_document))
    return result


def holds_tokens_to_score(tokenizer: PreTrainedTokenizerBase, documents: Sequence[Document]) -> bool:
    """Whether `evaluate_places` finds anything in documents."""
    return bool(_windows(documents, tokenizer, 4, 1, None))


def _windows(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, middles: int, vocabulary: int | None
) -> list[_Scored]:
    """All windows, longest first, so that a batch holds windows of similar length."""
    own = _own_beginning(tokenizer)
    front = own or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
    windows = []
    for index, ids in enumerate(encode(documents, tokenizer, vocabulary, add_special_tokens=False)):
        beginning = front + ids[: length - len(front)]
        if len(beginning) > max(1, len(front)):
            windows.append(_Scored(index, beginning, BEGINNING, max(1, len(front))))
        size = length - len(own)  # of a middle, without the tokens before it
        start, last = length - len(front), len(ids) - size
        count = min(middles, (len(ids) - start) // size)
        for number in range(count):
            at = start + (last - start) * number // max(1, count - 1)
            middle = own + ids[at : at + size]
            windows.append(_Scored(index, middle, MIDDLE, len(own) + size // 2))
    return sorted(windows, key=lambda window: -len(window.ids))


def _own_beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer itself adds before a text."""
    (bare,), (whole,) = (tokenizer(["a"], add_special_tokens=own)["input_ids"] for own in (False, True))
    at = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return list(whole[:at])
