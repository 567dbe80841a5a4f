"""The order of documents that are read while a model trains: several sources and files mixed, and shuffled."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

from parscale.checkpoints.texts.documents import Example

FILES_AT_ONCE = 8  # of a folder, open together
SHUFFLE_BUFFER = 10_000  # documents of a source in memory


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
    """All documents, each drawn from `SHUFFLE_BUFFER` of them that are read ahead.

    Args:
        documents: in their order.
        draw: random numbers.
    """
    held: list[Example] = []
    for document in documents:
        if len(held) < SHUFFLE_BUFFER:
            held.append(document)
            continue
        place = draw.randrange(len(held))
        yield held[place]
        held[place] = document
    draw.shuffle(held)
    yield from held
