"""Trackers of the Trainer: known and installed, before a run begins."""

from __future__ import annotations

from collections.abc import Sequence

from parscale.compat.transformers import reporting_callbacks


def check_trackers(names: Sequence[str]) -> None:
    """Refuses a tracker that the Trainer does not know, or whose package is missing or damaged.

    Raises:
        ValueError: there is one.
    """
    for name in names:
        try:
            for callback in reporting_callbacks([name]):
                callback()
        except ValueError as error:
            raise ValueError(f"There is no tracker {name!r} to report to: {error}") from error
        except (RuntimeError, ImportError) as error:
            raise ValueError(f"Reporting to {name} needs its package: {error}") from error
