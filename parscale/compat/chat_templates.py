"""transformers' chat templates: the clock that they read."""

from __future__ import annotations

import datetime
import functools
from contextlib import AbstractContextManager

from transformers.utils import chat_template_utils

from parscale.compat.names import needed
from parscale.compat.patching import replaced

_CLOCK = "datetime"


def dated(day: datetime.date) -> AbstractContextManager[None]:
    """In this block chat templates that write the date of today (`strftime_now`) write this day.

    transformers gives templates no other clock, and writes a function that is passed to a template as a text.

    Args:
        day: what they write; its time is midnight.

    Raises:
        IncompatibleVersionError: this version reads another clock.
    """
    needed(chat_template_utils, _CLOCK)
    return replaced(chat_template_utils, _CLOCK, _clock(day))


@functools.cache  # for each turn of each chat
def _clock(day: datetime.date) -> type[datetime.datetime]:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
            return cls(day.year, day.month, day.day, tzinfo=tz)

    return Clock
