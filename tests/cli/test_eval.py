"""`parscale eval`: the figures are those of `evaluate`."""

import json
import math

import pytest
from transformers import AutoTokenizer

import parscale
from parscale.checkpoints.evaluate import evaluate
from parscale.cli.application import run


def measure(capsys, *arguments: object) -> dict:
    assert run(["eval", *map(str, arguments), "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def files(text_file, tmp_path):
    other = tmp_path / "other.py"
    other.write_text("import os\n")
    return [text_file, other]


@pytest.mark.parametrize("streams", [None, "off", "other"])
def test_figures(two_sets, files, capsys, streams):
    model, tokenizer = parscale.load(two_sets), AutoTokenizer.from_pretrained(two_sets)
    if streams is not None:
        model.set_streams(None if streams == "off" else streams)
    expected = evaluate(model, tokenizer, [(str(path), path.read_text()) for path in files], sequence_length=64)
    option = [] if streams is None else ["--streams", streams]
    figures = measure(capsys, two_sets, "--data", *files, "--sequence-length", 64, *option)
    assert figures["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(expected.loss), rel=1e-6)
    assert figures["tokens"] == expected.tokens == sum(len(path.read_bytes()) - 1 for path in files)
    assert figures["streams"] == {None: 3, "off": "off", "other": 2}[streams]
    assert [document["name"] for document in figures["documents"]] == [str(path) for path in files]


def test_off_is_the_backbone(two_sets, backbone, files, capsys, tmp_path):
    """In the same precision, the streams' absence leaves the plain model's loss to the last bit."""
    import torch
    from transformers import LlamaForCausalLM

    plain = tmp_path / "plain"
    LlamaForCausalLM.from_pretrained(backbone, dtype=torch.float32).save_pretrained(plain)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(plain)
    off = measure(capsys, two_sets, "--data", *files, "--streams", "off")
    assert off["loss"] == measure(capsys, plain, "--data", *files)["loss"]


def test_as_text(two_sets, files, capsys):
    assert run(["eval", str(two_sets), "--data", str(files[0])]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {line[0] for line in lines} >= {"loss", "perplexity", "tokens"}
    assert ["documents", "1"] in lines


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--data", "nowhere.txt"], "nowhere.txt does not exist; give a text file"),
        (["--data", "."], ". is a folder; give a text file"),
        (["--sequence-length", "1"], "sequence_length is 1, and must be between 2 and the model's 128 positions"),
        (["--sequence-length", "129"], "sequence_length is 129"),
        (["--batch-size", "0"], "batch_size is 0, and must be at least 1"),
        (["--streams", "nothing"], "nothing"),
    ],
)
def test_bad_input(two_sets, text_file, capsys, options, complaint):
    data = [] if "--data" in options else ["--data", str(text_file)]
    assert run(["eval", str(two_sets), *data, *options]) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
