"""What every kind of text is read as: documents and chats with names, and sources that give them one by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

Document = tuple[str, str]
"""A name, for error messages, and a text."""


@dataclass(frozen=True)
class Completion:
    """A text whose end is learned; the beginning is only read.

    Attributes:
        prompt: the beginning.
        completion: what is learned.
    """

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """Messages; those of the assistant are learned.

    Attributes:
        messages: in the form that chat templates read, with a `role` and `content`.
        learned_from: the first message that may be learned; those before it are the prompt.
        tools: that the assistant may call, as JSON schemas.
        template_options: further arguments of the chat template.
    """

    messages: Sequence[Mapping[str, Any]]
    learned_from: int = 0
    tools: Sequence[Any] | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)


Example = tuple[str, str | Completion | Chat]
"""A name, as errors say it, and what a model is trained on."""


@dataclass(frozen=True)
class Source:
    """Documents or chats under one name, read anew each time that they are iterated over.

    Attributes:
        name: for error messages and model cards.
        read: starts reading from the beginning.
        dataset: its name on the Hugging Face Hub; None for files and for text in memory.
        begin: reads that many documents or chats from the beginning of each of its files, in the files' order; None if
            `read` reads few ahead.
    """

    name: str
    read: Callable[[], Iterator[Example]]
    dataset: str | None = None
    begin: Callable[[int], Iterator[Example]] | None = None

    def __iter__(self) -> Iterator[Example]:
        return self.read()

    def beginning(self, count: int) -> Iterator[Example]:
        """Documents or chats from the beginning of each of its files, for checks before any long work.

        Args:
            count: documents or chats of each file; of a source without files, of all.

        Yields:
            The first ones.
        """
        return islice(self.read(), count) if self.begin is None else self.begin(count)

    @classmethod
    def of(cls, name: str, documents: Iterable[Example]) -> Source:
        """A source of documents that are in memory.

        Args:
            name: as errors and model cards say it.
            documents: pairs of a name and a text, a `Completion` or a `Chat`.

        Returns:
            The source.
        """
        kept = tuple(documents)
        return cls(name, lambda: iter(kept))


Named = str | os.PathLike[str] | Source
"""Text that a user names, or gives."""


def text_documents(examples: Iterable[Example]) -> Iterator[Document]:
    """Those of the examples that are texts."""
    return ((name, text) for name, text in examples if isinstance(text, str))
