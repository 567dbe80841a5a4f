"""One model held against others on the same documents: at their beginnings and in their middles, with intervals.

All models read the same windows, with the same token in front (`parscale.checkpoints.evaluation.places`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from parscale.checkpoints.evaluation.controls import hold_against
from parscale.checkpoints.evaluation.places import MIDDLE
from parscale.checkpoints.evaluation.text_loss import Evaluation
from parscale.checkpoints.texts.documents import Document
from parscale.checkpoints.texts.token_ids import encode

Places = Mapping[str, Evaluation]
MIDDLES = 4
"""Windows of a document's middle, at most."""


def single_seed_entries(
    arm: str, baseline: str, text: str, measured: Mapping[str, Places], tokens: int
) -> list[dict[str, Any]]:
    """One model against another on one text, by place.

    Args:
        arm: the model's name.
        baseline: that of the other.
        text: what the documents are called.
        measured: by model's name, what `evaluate_places` gives.
        tokens: how many the model was trained on.

    Returns:
        For each place an entry as `hold_against` makes it, with `loss` and `baseline_loss`, means over documents. One
        document gives no interval: its `low` and `high` are None.

    Raises:
        ValueError: the two were measured on different documents or windows.
    """
    entries = []
    for where, found in measured[arm].items():
        losses = {name: fmean(document.loss for document in measured[name][where].documents) for name in measured}
        if len(found.documents) > 1:
            pair = {name: [{where: measured[name][where]}] for name in (arm, baseline)}
            (entry,) = hold_against(arm, baseline, text, pair, tokens)
        else:
            entry = {"arm": arm, "baseline": baseline, "text": text, "where": where, "tokens": tokens}
            difference = losses[arm] - losses[baseline]
            entry |= {"difference": difference, "low": None, "high": None, "seeds": 1, "documents": 1}
        entries.append(entry | {"loss": losses[arm], "baseline_loss": losses[baseline]})
    return entries


def first_documents(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, window: int, tokens: int
) -> list[Document]:
    """Documents in their order, until about so many of their tokens are measured.

    Args:
        documents: pairs of a name and a text.
        tokenizer: of the model.
        window: tokens in a window.
        tokens: how many are wanted.
    """
    found, count = [], 0
    for document in documents:
        (ids,) = encode([document], tokenizer)
        found.append(document)
        count += min(len(ids), (1 + MIDDLES) * window)
        if count >= tokens:
            break
    return found


def table_of(entries: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> Table:
    """What one model lost against each of others on one text, one row for each of them and each place.

    Args:
        entries: of one model and one text, as `single_seed_entries` makes them.
        titles: what the models are called in the table, by their names.
    """
    arm, text = titles[entries[0]["arm"]], entries[0]["text"]
    table = Table(title=f"{arm} on {text}: mean loss in nats per token", title_justify="left")
    for column in ("against", "where", "documents", "its loss", "this model's", "difference (95 % interval)"):
        table.add_column(column, justify="left" if column in ("against", "where") else "right")
    for entry in entries:
        table.add_row(
            titles[entry["baseline"]],
            entry["where"],
            str(entry["documents"]),
            f"{entry['baseline_loss']:.4f}",
            f"{entry['loss']:.4f}",
            format_interval(entry),
        )
    return table


def format_interval(entry: Mapping[str, Any]) -> str:
    """A difference with its interval, if there is one.

    Args:
        entry: of a report's `"comparisons"`, as those of the quickstart, of controls and of `parscale eval --against`.

    Returns:
        The text of both, with four digits after the point.
    """
    if entry["low"] is None:
        return f"{entry['difference']:+.4f} (one document: no interval)"
    return "{difference:+.4f} ({low:+.4f}, {high:+.4f})".format(**entry)


def direction(entry: Mapping[str, Any]) -> str:
    """What the interval says of a difference."""
    if entry["low"] is None:
        return "there is no interval with one document"
    if entry["high"] < 0:
        return "lower"
    return "higher" if entry["low"] > 0 else "no difference that these documents show"


def verdict(entries: Sequence[Mapping[str, Any]]) -> str:
    """Whether one model is ahead of all its controls, from its entries in the middle of one text.

    A run has one seed, so it can deny a gain and cannot prove one.
    """
    if any(entry["high"] is None for entry in entries):
        return "one document decides nothing"
    ahead = all(entry["high"] < 0 for entry in entries)
    return "ahead of each control with this seed; a gain needs several seeds" if ahead else "no gain"


def no_middle(text: str) -> str:
    """The sentence on a text that cannot show a gain."""
    return f"No document of {text} is long enough for a middle, where a gain has to show."


def in_the_middle(entries: Iterable[Mapping[str, Any]], arm: str, baselines: Sequence[str]) -> dict[str, list[Any]]:
    """By text, the entries of one model against each of its controls in the middle of documents."""
    found: dict[str, list[Any]] = {}
    for entry in entries:
        if (entry["arm"], entry["where"]) == (arm, MIDDLE) and entry["baseline"] in baselines:
            found.setdefault(entry["text"], []).append(entry)
    return found


def middle_sentences(
    entries: Sequence[Mapping[str, Any]], arm: str, baselines: Sequence[str], say: Callable[[str, list[Any]], str]
) -> list[str]:
    """For each text a sentence: what `say` makes of it and its entries in the middle, or that it has no middle."""
    held = in_the_middle(entries, arm, baselines)
    texts = dict.fromkeys(entry["text"] for entry in entries)
    return [say(text, held[text]) if text in held else no_middle(text) for text in texts]
