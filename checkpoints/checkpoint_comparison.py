"""Checkpoints compared on the same documents: what `parscale eval --against` calls."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from parscale.checkpoints.description import describe
from parscale.checkpoints.evaluation.paired_differences import MIDDLES, Places, single_seed_entries
from parscale.checkpoints.evaluation.places import evaluate_places
from parscale.checkpoints.evaluation.text_loss import positions_of
from parscale.checkpoints.models import (
    find_tokenizer,
    open_checkpoint,
    require_merged,
    require_tokenizer,
    text_config,
)
from parscale.checkpoints.texts.documents import Document
from parscale.checkpoints.texts.token_ids import encode
from parscale.config import PROMPT, STREAMS_OFF
from parscale.streams.state import find_state

TEXT = "the text"


def compare_checkpoints(
    this: tuple[Any, PreTrainedTokenizerBase, str],
    others: Sequence[str],
    documents: Sequence[Document],
    *,
    sequence_length: int,
    batch_size: int = 8,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """One model against other checkpoints, at the beginnings and in the middles of documents.

    Args:
        this: the model in the state it is in, its tokenizer and what it is called.
        others: folders or names on the Hugging Face Hub; `"off"` is the first model without its streams.
        documents: pairs of a name and a text.
        sequence_length: tokens in a window.
        batch_size: windows in a batch.
        device: where the others run; by default on a GPU if there is one.

    Returns:
        For each of the others and each place an entry, as
        `parscale.checkpoints.evaluation.paired_differences.single_seed_entries`.

    Raises:
        ValueError: a checkpoint is damaged, has another tokenization of the documents or too few positions, or is the
            first one.
        OSError: there is no such checkpoint.
    """
    model, tokenizer, name = this

    def places(model: Any) -> Places:
        return evaluate_places(
            model,
            tokenizer,
            documents,
            sequence_length=sequence_length,
            middles=MIDDLES,
            batch_size=batch_size,
            progress=True,
        )

    for other in others:  # before anything is measured
        if _place(other) == _place(name):
            raise ValueError(f"{name} cannot be compared with itself; its own plain backbone is called 'off'.")
        if other == STREAMS_OFF:
            if find_state(model) is None:
                raise ValueError(f"{name} has no streams to turn off; leave 'off' out of --against.")
            if model.parscale.active is None:
                raise ValueError(f"The streams of {name} are off already; leave 'off' out of --against.")
            continue
        require_merged(other)
        positions = _positions(other)
        if encode(documents, require_tokenizer(find_tokenizer(other), other)) != encode(documents, tokenizer):
            raise ValueError(f"{other} reads the text as other tokens than {name}, so their losses do not compare.")
        if sequence_length > positions:
            raise ValueError(
                f"{other} has positions for {positions} tokens of text, and sequence_length is {sequence_length}; give "
                f"at most {positions}, for all that are compared."
            )
    measured = {name: places(model)}
    entries = []
    for other in dict.fromkeys(others):
        if other == STREAMS_OFF:
            with model.use_streams(None):
                measured[other] = places(model)
        else:
            rival, _ = open_checkpoint(other, device=device)
            measured[other] = places(rival)
            del rival
        entries += single_seed_entries(name, other, TEXT, {key: measured[key] for key in (name, other)}, 0)
    return [{key: value for key, value in entry.items() if key not in ("tokens", "seeds")} for entry in entries]


def _positions(checkpoint: str) -> float:
    """How many tokens of text a checkpoint has positions for, infinity if it states none; no weight is read."""
    what = describe(checkpoint)
    taken: int = what["prefix_length"] if what["transform"] == PROMPT else 0
    return positions_of(text_config(checkpoint)) - taken


def _place(checkpoint: str) -> str:
    """The folder that a checkpoint is in, however it is named; names on the Hub stay as they are."""
    return os.path.realpath(checkpoint) if os.path.isdir(checkpoint) else checkpoint
