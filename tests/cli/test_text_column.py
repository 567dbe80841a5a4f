"""Files of rows to measure on and to start from: each row's text under the name that is given, as for training."""

import json

import pytest

from parscale.cli.application import BAD_INPUT, run

TEXTS = ["def f(x):\n    return x\n", "import os\n" * 20]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"body": text} for text in TEXTS]))
    return path


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{number}.py" for number in range(len(TEXTS))]
    for path, text in zip(paths, TEXTS, strict=True):
        path.write_text(text)
    return paths


def printed(capsys, *arguments):
    assert run([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", ["eval", "diagnose"])
def test_rows_measure_as_files_do(two_sets, rows, files, capsys, command):
    figures = printed(capsys, command, two_sets, "--data", rows, "--text-column", "body")
    expected = printed(capsys, command, two_sets, "--data", *files)
    if command == "eval":
        assert [document.pop("name") for document in figures["documents"]] == [f"{rows}:1", f"{rows}:2"]
        assert [document.pop("name") for document in expected["documents"]] == list(map(str, files))
    assert figures == expected


def test_streams_start_from_rows_as_from_files(backbone, rows, files, tmp_path, capsys):
    sizes = ["--num-streams", 2, "--prefix-length", 4, "--init", "context", "--seed", 0, "--streams-only"]
    printed(capsys, "convert", backbone, tmp_path / "a", *sizes, "--calibration", rows, "--text-column", "body")
    printed(capsys, "convert", backbone, tmp_path / "b", *sizes, "--calibration", *files)
    assert (tmp_path / "a" / "streams.safetensors").read_bytes() == (
        tmp_path / "b" / "streams.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("command", ["eval", "diagnose"])
def test_a_column_that_is_missing_is_named(two_sets, rows, capsys, command):
    assert run([command, str(two_sets), "--data", str(rows)]) == BAD_INPUT
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "row 1, has no column 'text'; it has: 'body'. Name the one that holds the text with --text-column." in said
