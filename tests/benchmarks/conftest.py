"""The study's files, which are no package."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EVIDENCE = Path(__file__).parents[2] / "benchmarks" / "evidence"


@pytest.fixture(scope="module")
def evidence() -> Iterator[None]:
    """Lets a test import the study's files by name, as they import one another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EVIDENCE))
        yield
    for name in [name for name, module in sys.modules.items() if str(EVIDENCE) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]
