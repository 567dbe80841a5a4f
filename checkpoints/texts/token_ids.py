"""Turns texts into token ids, and checks for text that no tokenizer reads and for ids outside the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parscale.compat.deepspeed import whole_shape


def encode(
    documents: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int | None = None,
    *,
    add_special_tokens: bool = True,
) -> list[list[int]]:
    """Token ids of each document.

    Args:
        documents: pairs of a name and a text.
        tokenizer: the model's tokenizer.
        vocabulary: number of token ids that the model has; without it, ids are not checked.
        add_special_tokens: as in a call of the tokenizer.

    Raises:
        ValueError: a text holds half a surrogate pair, or the tokenizer gives an id outside the vocabulary.
    """
    if not documents:
        return []
    texts = [require_text(name, text) for name, text in documents]
    encoded: list[list[int]] = tokenizer(
        texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
    )["input_ids"]
    if vocabulary is not None:
        for ids in encoded:
            require_known(ids, vocabulary)
    return encoded


def require_text(where: str, text: str) -> str:
    r"""Returns the text, or raises an error if it is not valid text.

    In JSON, `"\ud83d"` is half of a surrogate pair; on a command line such a half stands for a byte that is not UTF-8.

    Args:
        where: the place, for error messages, such as `"a.jsonl, line 3"`.
        text: the text to check.

    Raises:
        ValueError: it holds half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: character {error.start + 1} is {text[error.start]!a}, half of a character or a byte that is "
            "not UTF-8, which no tokenizer reads; correct or remove the text."
        ) from error
    return text


def require_known(ids: Iterable[int], vocabulary: int) -> None:
    """Checks that token ids are in the vocabulary of a model.

    Args:
        ids: of a text.
        vocabulary: number of ids that the model has.

    Raises:
        ValueError: an id is not.
    """
    largest = max(ids, default=0)
    if largest >= vocabulary:
        raise ValueError(
            f"The tokenizer gives the token id {largest}, but the model has only {vocabulary} ids: it "
            "is the tokenizer of another model. Put the model's own tokenizer into its folder."
        )


def vocabulary_of(model: PreTrainedModel) -> int:
    """The number of token ids that a model has: the rows of its embedding."""
    weight: Any = model.get_input_embeddings().weight
    return whole_shape(weight)[0]


@contextmanager
def only_known_ids(model: PreTrainedModel) -> Iterator[None]:
    """In this block a model raises a `ValueError` for ids outside its vocabulary, whoever encoded the text."""

    def check(module: object, args: tuple[torch.Tensor, ...]) -> None:
        (ids,) = args
        if ids.numel():
            require_known([int(ids.max())], vocabulary)

    vocabulary = vocabulary_of(model)
    with model.get_input_embeddings().register_forward_pre_hook(check):
        yield
