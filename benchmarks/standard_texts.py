"""Texts that every Python brings along: its standard library's source, and the copy of its language reference."""

from __future__ import annotations

from typing import NamedTuple

from parscale.checkpoints import CODE, Document, standard_library_split

PROSE = "prose"


class Texts(NamedTuple):
    """Documents to train on, and by kind, `CODE` or `PROSE`, those to measure on."""

    train: list[Document]
    measured: dict[str, list[Document]]


def standard_texts(code_characters: int | None = None, prose_characters: int | None = None) -> Texts:
    """The standard library's files, and pydoc's topics as prose.

    Args:
        code_characters: maximum number of characters of each held-out file; by default all.
        prose_characters: likewise for each topic.
    """
    from pydoc_data.topics import topics

    train, held_out = standard_library_split()
    return Texts(
        train,
        {
            CODE: [(name, text[:code_characters]) for name, text in held_out],
            PROSE: [(name, text[:prose_characters]) for name, text in sorted(topics.items())],
        },
    )
