"""Outcomes of another library's tests on wrapped models, and the reasons of those that should fail there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Expected = Sequence[tuple[str, str, str]]  # patterns of a test's name and of what it says, and why it should fail


def reason_of(expected: Expected, test: str, outcome: str) -> str | None:
    """Why a test should fail like this on a wrapped model; `None` if it should not."""
    return next((why for name, text, why in expected if re.search(name, test) and re.search(text, outcome)), None)


def row_of(streams: Mapping[str, Any], outcomes: Mapping[str, str], expected: Expected) -> dict[str, Any]:
    """What tests that pass on the plain model do with streams, for a file of results.

    Args:
        streams: the set of streams.
        outcomes: by test: `"passes"`, `"skipped"` or what went wrong.
        expected: the failures that should be.
    """
    failed = {test: outcome for test, outcome in outcomes.items() if outcome not in ("passes", "skipped")}
    return {
        **streams,
        "pass": list(outcomes.values()).count("passes"),
        "skipped": [test for test, outcome in outcomes.items() if outcome == "skipped"],
        "fail": {
            test: {"outcome": outcome, "reason": reason_of(expected, test, outcome)} for test, outcome in failed.items()
        },
    }


def unexpected(row: Mapping[str, Any]) -> int:
    """How many failures of such a row have no reason."""
    return sum(failure["reason"] is None for failure in row["fail"].values())
