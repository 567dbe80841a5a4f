"""`parscale train`."""

import json

import pytest
from training_runs import stopped_after

from parscale import load
from parscale.cli.application import BAD_INPUT, INTERRUPTED, run
from parscale.cli.options import count

SIZES = ["--tokens", "0.192K", "--sequence-length", "16", "--batch-size", "4", "--eval-tokens", "64"]


def test_trains_and_reports(two_sets, text_file, tmp_path, capsys):
    arguments = ["train", str(two_sets), "--data", str(text_file), str(text_file), "--output", str(tmp_path / "run")]
    assert run([*arguments, *SIZES, "--freeze-backbone", "--eval-data", f"code={text_file}", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"] == 192
    assert report["data"] == [str(text_file)] * 2
    assert report["losses"].keys() == {"code"}
    assert report["losses"]["code"].keys() == {"backbone", "before", "after"}
    model = load(tmp_path / "run")
    assert model.num_streams == 3
    assert set(model.parscale.sets) == {"default", "other"}

    assert run([*arguments, *SIZES, "--freeze-backbone", "--eval-data", f"code={text_file}"]) == BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 1
    assert run([*arguments, *SIZES, "--freeze-backbone", "--eval-data", f"code={text_file}", "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "had already finished; there was nothing to do" in printed
    assert f"after {report['losses']['code']['after']:.4f}" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "gone.txt"], "gone.txt does not exist"),
        (["--data", "empty.txt"], "empty.txt is empty"),
        (["--data", "binary.txt"], "binary.txt is not text in UTF-8"),
        (["--data", "lines.jsonl"], "lines.jsonl, line 2, is not JSON"),
        (["--data", "columns.jsonl"], "has no column 'text'; it has: 'body'"),
        (["--data", "short.txt"], "The data holds 6 tokens, fewer than one sequence of 16"),
        (["--data", "short.txt", "--eval-data", "a.txt", "b/a.txt"], "Two evaluation texts are called 'a'"),
        (["--data", "short.txt", "--eval-data", "a=b.txt", "a=b.txt"], "Two evaluation texts are called 'a-b'"),
        (["--data", "short.txt", "--quantize", "int8"], "A quantized backbone cannot train"),
        (["--data", "short.txt", "--eval-data", "=short.txt"], "eval_data calls 'short.txt' ''; give a text by a name"),
        (["--data", "short.txt", "--eval-data", "code="], "A text has an empty name"),
        (["--data", "short.txt", "--seed", "5000000000"], "seed is 5000000000, and must be at most 4294967295"),
        ([], "Missing option '--data'"),
        (["--data", "short.txt", "--tokens", "1.5"], "'1.5' is not a whole number; give one such as 20000000 or 20M"),
        (["--data", "short.txt", "--tokens", "many"], "'many' is not a size"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(two_sets, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    for name, contents in {
        "empty.txt": b"",
        "binary.txt": b"\x80\x81",
        "lines.jsonl": b'{"text": "a"}\nnot JSON\n',
        "columns.jsonl": b'{"body": "a"}\n',
        "short.txt": b"short",
        "a=b.txt": b"a file of this name, not a name for another",
    }.items():
        (tmp_path / name).write_bytes(contents)
    sizes = ["--sequence-length", "16", "--batch-size", "4"]
    assert run(["train", str(two_sets), "--output", "run", *sizes, *arguments]) == BAD_INPUT
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (tmp_path / "run").exists()


def test_an_interruption_says_how_to_go_on(two_sets, text_file, tmp_path, capsys):
    arguments = ["train", str(two_sets), "--data", str(text_file), "--output", str(tmp_path / "run"), *SIZES]
    with stopped_after(1):
        assert run(arguments) == INTERRUPTED
    assert "checkpoint-1; --resume continues from there" in capsys.readouterr().err
    assert run([*arguments, "--resume"]) == 0


def test_a_count_with_a_letter_is_the_whole_number_that_it_says():
    """4.1 times a million is a little less, in binary."""
    for letter, thousands in (("K", 1), ("M", 1000), ("B", 10**6)):
        assert all(count(f"{n / 10}{letter}") == n * 100 * thousands for n in range(1, 1000))
