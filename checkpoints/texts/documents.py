"""Documents with names, and sources that yield them: the form in which all text is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Document = tuple[str, str]
"""A name, for error messages, and a text."""


@dataclass(frozen=True)
class Source:
    """Documents under one name, read again each time that they are iterated over.

    Attributes:
        name: for error messages and model cards.
        read: starts reading from the beginning.
        dataset: its name on the Hugging Face Hub; None for files and for text in memory.
    """

    name: str
    read: Callable[[], Iterator[Document]]
    dataset: str | None = None

    def __iter__(self) -> Iterator[Document]:
        return self.read()

    @classmethod
    def of(cls, name: str, documents: Sequence[Document]) -> Source:
        """A source of documents in memory.

        Args:
            name: for error messages and model cards.
            documents: pairs of a name and a text.

        Returns:
            The source.
        """
        return cls(name, lambda: iter(documents))
