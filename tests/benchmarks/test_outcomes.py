"""Failures on wrapped models are told apart by the reasons that are listed for them."""

import importlib
from pathlib import Path

import pytest

EXPECTED = (("attention_", "has 11 columns", "the prefix has columns"), ("", "refused", "it is refused"))


@pytest.fixture
def outcomes(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("outcomes")


def test_a_reason_is_for_a_name_and_a_message(outcomes):
    assert outcomes.reason_of(EXPECTED, "test_attention_shape", "it has 11 columns") == "the prefix has columns"
    assert outcomes.reason_of(EXPECTED, "test_hidden_shape", "it has 11 columns") is None
    assert outcomes.reason_of(EXPECTED, "test_hidden_shape", "refused") == "it is refused"


def test_a_row_counts_each_outcome_once(outcomes):
    said = {"test_a": "passes", "test_b": "skipped", "test_c": "refused", "test_d": "wrong", "test_e": "passes"}
    row = outcomes.row_of({"num_streams": 2, "kv": "own"}, said, EXPECTED)
    assert row == {
        "num_streams": 2,
        "kv": "own",
        "pass": 2,
        "skipped": ["test_b"],
        "fail": {
            "test_c": {"outcome": "refused", "reason": "it is refused"},
            "test_d": {"outcome": "wrong", "reason": None},
        },
    }
    assert outcomes.unexpected(row) == 1
