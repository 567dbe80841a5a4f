"""The loss of a causal language model on text, by document.

A document is cut into windows of `sequence_length` tokens. Each window begins with the last token of the window before.
So each token of a document except its first is predicted exactly once, from the tokens before it in its window, and the
number of predicted tokens does not depend on the length of the windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parscale.checkpoints.texts.documents import Document
from parscale.checkpoints.texts.token_ids import encode, vocabulary_of
from parscale.config import PROMPT
from parscale.methods import adaptive_streams
from parscale.streams.passes import Adaptive
from parscale.streams.state import active_streams

DEFAULT_SEQUENCE_LENGTH = 1024
W = TypeVar("W")


@dataclass(frozen=True)
class DocumentLoss:
    """The loss on one document.

    Attributes:
        name: its name, as given.
        loss: mean over its predicted tokens, in nats.
        tokens: number of predicted tokens.
    """

    name: str
    loss: float
    tokens: int


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        loss: nats per predicted token; every token has the same weight.
        perplexity: `exp(loss)`.
        tokens: number of predicted tokens.
        sequence_length: the length of the windows in tokens.
        documents: the results by document, in the given order, without documents of fewer than two tokens.
        mean_streams: the mean number of streams that ran for a token, if streams run on chosen tokens only.
    """

    loss: float
    perplexity: float
    tokens: int
    sequence_length: int
    documents: tuple[DocumentLoss, ...]
    mean_streams: float | None = None


@dataclass(frozen=True)
class Window:
    """A piece of a document: the index of the document, and its token ids."""

    document: int
    ids: list[int]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    sequence_length: int | None = None,
    batch_size: int = 8,
    adaptive: float | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measures a model's loss on documents, with its active streams or as the plain backbone.

    Args:
        model: a causal language model; it runs on its own device and in its own dtype. Losses are summed in float64.
        tokenizer: its tokenizer; each document begins with the special tokens that it adds.
        documents: pairs of a name and a text.
        sequence_length: tokens in a window, at least 2 and at most the number of the model's positions; by default
            1024, or the number of positions if that is smaller.
        batch_size: windows in a batch; memory for logits grows with `batch_size * sequence_length * vocabulary`.
        adaptive: for streams that share keys and values: the entropy of stream 0's prediction, in nats, above which
            streams 1 to P - 1 run for a token. 0: always, infinity: never.
        progress: whether to show a progress bar on standard error.

    Returns:
        The losses, over all documents and by document.

    Raises:
        ValueError: a number is out of range, the active streams cannot adapt, no document has two tokens, a text holds
            half a surrogate pair, or the tokenizer gives an id outside the model's vocabulary.
    """
    length = checked_length(model, sequence_length)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, and must be at least 1.")
    windows = windows_of(documents, tokenizer, length, vocabulary_of(model))
    if not windows:
        raise ValueError("No document has two tokens, but the first token is never predicted: give longer text.")

    sums = [0.0] * len(documents)
    counts = [0] * len(documents)
    ran = 0
    with evaluating(model), torch.inference_mode(), adapting(model, adaptive) as chooser:
        for batch in batches_of(windows, batch_size, progress):
            losses = summed_losses(model, [(window.ids, 1) for window in batch])
            for window, loss in zip(batch, losses, strict=True):
                sums[window.document] += loss
                counts[window.document] += len(window.ids) - 1
            if chooser is not None:
                ran += sum(chooser.ran_in(row, len(window.ids) - 1) for row, window in enumerate(batch))

    total, tokens = math.fsum(sums), sum(counts)
    by_document = tuple(
        DocumentLoss(name, sums[index] / counts[index], counts[index])
        for index, (name, _) in enumerate(documents)
        if counts[index]
    )
    loss = total / tokens
    mean = None if chooser is None else chooser.mean_of(ran, tokens)
    return Evaluation(loss, perplexity_of(loss), tokens, length, by_document, mean)


def adapting(model: PreTrainedModel, threshold: float | None) -> AbstractContextManager[Adaptive | None]:
    """In this block streams run on chosen tokens, if there is a threshold; see `evaluate`."""
    return nullcontext() if threshold is None else adaptive_streams(model, threshold)


def shown_threshold(threshold: float) -> float | str:
    """A threshold in a type that JSON supports."""
    return threshold if math.isfinite(threshold) else "inf"


def checked_length(model: PreTrainedModel, sequence_length: int | None) -> int:
    """The number of tokens in a window or sequence: as given, or 1024, or the model's positions if they are fewer.

    Raises:
        ValueError: it is below 2, or the model has fewer positions; or the prompts leave none for text.
    """
    positions, taken = text_positions(model)
    if positions < 2:
        raise ValueError(
            f"The prompts of {taken} tokens leave {max(0, positions)} of the model's {positions + taken} positions for "
            "text, and it needs at least 2. Use shorter prompts, or a model with more positions."
        )
    if sequence_length is None:
        return int(min(DEFAULT_SEQUENCE_LENGTH, positions))
    if not 2 <= sequence_length <= positions:
        less = f" that its prompts of {taken} tokens leave" if taken else ""
        limit = f"between 2 and the model's {positions} positions{less}" if positions < math.inf else "at least 2"
        raise ValueError(f"sequence_length is {sequence_length}, and must be {limit}.")
    return sequence_length


def positions_of(text_config: Any) -> float:
    """How many positions a language model's configuration states; infinity if it states none, or 0."""
    positions: float = getattr(text_config, "max_position_embeddings", None) or math.inf
    return positions


def text_positions(model: PreTrainedModel) -> tuple[float, int]:
    """How many tokens of text the model has positions for, infinity if it states none, and how many its prompts take.

    Prompts are embeddings in front of the text, and take positions as that does; prefixes lie before the first one.
    """
    positions = positions_of(model.config.get_text_config())
    streams = active_streams(model)
    taken = streams.config.prefix_length if streams is not None and streams.config.transform == PROMPT else 0
    return positions - taken, taken


def windows_of(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, vocabulary: int
) -> list[Window]:
    """The documents' windows of at most `length` ids, the longest first: a batch then holds windows of like length.

    Raises:
        ValueError: as `parscale.checkpoints.texts.token_ids.encode`.
    """
    encoded = encode(documents, tokenizer, vocabulary)
    windows = [Window(index, ids) for index, whole in enumerate(encoded) for ids in _cut(whole, length)]
    return sorted(windows, key=lambda window: -len(window.ids))


def padded(batch: Sequence[list[int]], device: torch.device) -> torch.Tensor:
    """Windows as one tensor `(B, S)`, padded on the right, where a causal model's tokens never look."""
    longest = max(len(ids) for ids in batch)
    return torch.tensor([ids + [0] * (longest - len(ids)) for ids in batch], device=device)


def _cut(ids: list[int], length: int) -> Iterator[list[int]]:
    """Windows of at most `length` ids that overlap by one; none from fewer than two ids."""
    for start in range(0, len(ids) - 1, length - 1):
        yield ids[start : start + length]


def summed_losses(model: PreTrainedModel, batch: Sequence[tuple[list[int], int]]) -> list[float]:
    """Each window's summed loss in nats, from its token `first` on.

    Args:
        model: a causal language model.
        batch: the ids of each window, and `first`, the index of its first scored token, at least 1.
    """
    input_ids = padded([ids for ids, _ in batch], model.device)  # (B, S)
    logits = model(input_ids=input_ids, use_cache=False).logits  # (B, S, V)
    sums = []
    for row, (ids, first) in enumerate(batch):  # one row at a time: a float32 copy of all logits may be large
        predicted = logits[row, first - 1 : len(ids) - 1]
        predicted = predicted if predicted.dtype == torch.float64 else predicted.float()
        targets = input_ids[row, first : len(ids)].to(predicted.device)
        sums.append(cross_entropy(predicted, targets, reduction="none").double().sum().item())
    return sums


def perplexity_of(loss: float) -> float:
    """`exp(loss)`; infinity if that is too large for a float."""
    return math.inf if loss > 700 else math.exp(loss)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """In this block the model is in eval mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def batches_of(windows: Sequence[W], batch_size: int, shown: bool) -> Iterator[Sequence[W]]:
    """The windows in batches, with a progress bar on standard error if it is wanted."""
    batches = [windows[start : start + batch_size] for start in range(0, len(windows), batch_size)]
    if not shown:
        yield from batches
        return
    from rich.progress import track

    from parscale.terminal.console import Terminal

    console = Terminal(stderr=True)
    hidden = not console.is_terminal
    yield from track(batches, description="Evaluating", console=console, disable=hidden, transient=True)
