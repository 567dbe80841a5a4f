"""`parscale diagnose`: the figures are those of `diagnose`."""

import json

import pytest
from transformers import AutoTokenizer

import parscale
from parscale.checkpoints.evaluation.diagnosis import diagnose, sentences
from parscale.cli.application import run


@pytest.fixture
def files(text_file, tmp_path):
    other = tmp_path / "other.py"
    other.write_text("import os\n")
    return [text_file, other]


@pytest.mark.parametrize(("streams", "P"), [(None, 3), ("other", 2)])
def test_figures(two_sets, files, capsys, streams, P):
    model, tokenizer = parscale.load(two_sets), AutoTokenizer.from_pretrained(two_sets)
    option = []
    if streams is not None:
        model.set_streams(streams)
        option = ["--streams", streams]
    expected = diagnose(model, tokenizer, [(str(path), path.read_text()) for path in files], sequence_length=64)
    command = ["diagnose", str(two_sets), "--data", *map(str, files), "--sequence-length", "64", "--batch-size", "3"]
    assert run([*command, *option, "--device", "cpu", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["streams"] == (streams or "default")
    assert figures["num_streams"] == P == len(figures["losses"])
    assert figures["losses"] == pytest.approx(expected.losses.tolist(), rel=1e-5)
    assert figures["mixture_loss"] == pytest.approx(expected.mixture_loss, rel=1e-5)
    assert figures["mean_correlation"] == pytest.approx(expected.mean_correlation, abs=1e-4)
    assert len(figures["weights_by_position"]) == len(figures["entropy_by_position"]) == 63
    assert figures["tokens"] == sum(len(path.read_bytes()) - 1 for path in files)
    assert figures["sentences"] == sentences(expected)


def test_as_text(two_sets, files, capsys, tmp_path):
    plot = tmp_path / "streams.png"
    command = ["diagnose", str(two_sets), "--data", str(files[1]), "--plot", str(plot), "--device", "cpu"]
    assert run(command) == 0
    printed = capsys.readouterr().out
    assert "loss of each stream" in printed
    assert "Alone, the streams have losses of" in printed
    assert "of the whole gain" in printed
    assert "Whether they gain anything is said by controls: parscale train --controls." in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--data", "nowhere.txt"], "nowhere.txt does not exist; give a text file"),
        (["--sequence-length", "1"], "sequence_length is 1, and must be between 2 and the model's 128 positions"),
        (["--batch-size", "0"], "batch_size is 0, and must be at least 1"),
        (["--streams", "nothing"], "nothing"),
        (["--streams", "off"], "No streams are active"),
        (["--plot", "streams.xyz"], "streams.xyz must end in one of .png, .pdf, .svg"),
        (["--plot", "nowhere/streams.png"], "There is no folder nowhere"),
    ],
)
def test_bad_input(two_sets, text_file, capsys, options, complaint):
    data = [] if "--data" in options else ["--data", str(text_file)]
    assert run(["diagnose", str(two_sets), *data, *options]) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_plain_model(backbone, text_file, capsys):
    assert run(["diagnose", str(backbone), "--data", str(text_file)]) == 2
    assert "No streams are active" in capsys.readouterr().err
