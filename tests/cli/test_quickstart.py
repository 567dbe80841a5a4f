"""`parscale quickstart` hands its options on, and prints the report as JSON if asked."""

import json
from pathlib import Path

import pytest

from parscale.checkpoints.quickstart import run as quickstart
from parscale.cli.application import run


@pytest.fixture
def calls(monkeypatch):
    """What the quickstart was called with; in its place stands something quick."""
    calls = []

    def stand_in(output, *, seed, console):
        calls.append((output, seed))
        console.print("working")
        return {"models": {}}

    monkeypatch.setattr(quickstart, "run_quickstart", stand_in)
    return calls


def test_defaults(calls, capsys):
    assert run(["quickstart"]) == 0
    assert calls == [(Path("parscale-quickstart"), 0)]
    assert capsys.readouterr().out == "working\n"


def test_json_stands_alone_on_standard_output(calls, tmp_path, capsys):
    assert run(["quickstart", "--output", str(tmp_path / "it"), "--seed", "5", "--json"]) == 0
    assert calls == [(tmp_path / "it", 5)]
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"models": {}}
    assert printed.err == "working\n"


def test_output_that_holds_something(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert run(["quickstart", "--output", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
