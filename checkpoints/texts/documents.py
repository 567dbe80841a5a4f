"""What every kind of text is read as: documents with names, and sources that give them one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Document = tuple[str, str]
"""A name, as errors say it, and a text."""


@dataclass(frozen=True)
class Source:
    """Documents under one name, read anew each time that they are iterated over.

    Attributes:
        name: as errors and model cards say it.
        read: opens it anew.
        dataset: its name on the Hugging Face Hub; None for what lay on the disk or in memory when it was opened.
    """

    name: str
    read: Callable[[], Iterator[Document]]
    dataset: str | None = None

    def __iter__(self) -> Iterator[Document]:
        return self.read()

    @classmethod
    def of(cls, name: str, documents: Sequence[Document]) -> Source:
        """A source of documents that are in memory.

        Args:
            name: as errors and model cards say it.
            documents: pairs of a name and a text.

        Returns:
            The source.
        """
        return cls(name, lambda: iter(documents))
