"""transformers' chat templates: the clock that they read."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import chat_template_utils

from parscale.compat.names import needed

_CLOCK = "datetime"


@contextmanager
def dated(day: datetime.date) -> Iterator[None]:
    """In this block chat templates that write the date of today (`strftime_now`) write this day.

    transformers gives templates no other clock, and writes a function that is passed to a template as a text.

    Args:
        day: what they write; its time is midnight.
    """
    before = needed(chat_template_utils, _CLOCK)
    setattr(chat_template_utils, _CLOCK, _clock(day))
    try:
        yield
    finally:
        setattr(chat_template_utils, _CLOCK, before)


@functools.cache  # for each turn of each chat
def _clock(day: datetime.date) -> type[datetime.datetime]:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
            return cls(day.year, day.month, day.day, tzinfo=tz)

    return Clock
