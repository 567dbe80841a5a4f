"""The order of documents that are read while a model trains: several sources and files mixed, and shuffled."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from parscale.checkpoints.texts.documents import Completion, Example

FILES_AT_ONCE = 8  # of a source, open together
SHUFFLE_BUFFER = 10_000  # documents of a source in memory
SHUFFLE_CHARACTERS = 2**28  # of them, unless one alone has more


def in_turn(sources: Iterable[Iterable[Example]], at_once: int | None = None) -> Iterator[Example]:
    """A document of each source in turn; where one ends, the others go on.

    Args:
        sources: what is mixed.
        at_once: how many are read together, the first ones; where one ends, the next takes its place. Default: all.
    """
    waiting = map(iter, sources)
    reading = deque(islice(waiting, at_once))
    while reading:
        documents = reading.popleft()
        found = list(islice(documents, 1))
        reading.extend([documents] if found else islice(waiting, 1))
        yield from found


def shuffled(documents: Iterable[Example], draw: random.Random) -> Iterator[Example]:
    """All documents, each drawn from a window of them that are read ahead.

    The window holds up to `SHUFFLE_BUFFER` documents and `SHUFFLE_CHARACTERS` characters.

    Args:
        documents: in their order.
        draw: random numbers.
    """
    held: list[Example] = []
    size = 0
    for document in documents:
        more = _characters(document)
        while held and (len(held) >= SHUFFLE_BUFFER or size + more > SHUFFLE_CHARACTERS):
            place = draw.randrange(len(held))
            held[place], held[-1] = held[-1], held[place]
            size -= _characters(held[-1])
            yield held.pop()
        held.append(document)
        size += more
    draw.shuffle(held)
    yield from held


def _characters(document: Example) -> int:
    """The characters of a document or chat, about."""
    contents = document[1]
    if isinstance(contents, str):
        return len(contents)
    if isinstance(contents, Completion):
        return len(contents.prompt) + len(contents.completion)
    return sum(len(str(message)) for message in contents.messages)
