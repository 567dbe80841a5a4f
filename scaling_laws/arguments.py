"""Checks of arguments, each with one sentence for its error."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral


def require_count(name: str, value: object, most: int | None = None) -> None:
    """Raises `ValueError` for anything but a whole number of at least 1 and, if given, at most `most`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
    if most is not None and int(value) > most:
        raise ValueError(f"{name} is above the maximum of {most:,}; give a smaller one")


def require_known(name: str, value: object, known: Iterable[str]) -> None:
    """Raises `ValueError` for a name that is not one of those that are known."""
    names = list(known)
    if value not in names:
        raise ValueError(f"no {name} {value!r}; give one of {', '.join(names)}")
