"""`parscale info`: what it says of each kind of folder."""

import json
import shutil

import pytest
from transformers import LlamaForCausalLM

import parscale
from parscale.cli.application import run
from parscale.version import __version__


def info(capsys, checkpoint) -> dict:
    assert run(["info", str(checkpoint), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_full_checkpoint_with_a_further_set(two_sets, capsys):
    said = info(capsys, two_sets)
    model = parscale.load(two_sets)
    added = {
        name: sum(tensor.numel() for tensor in model.parscale.tensors(streams).values())
        for name, streams in model.parscale.sets.items()
    }
    assert (said["kind"], said["written_by"]) == ("full", f"parscale {__version__}")
    assert said["backbone"] == {"class": "LlamaForCausalLM", "model_type": "llama", "name": "in this folder"}
    assert said["active_streams"] == "default"
    assert (said["num_streams"], said["prefix_length"], said["smoothing"]) == (3, 5, 0.1)
    assert (said["init"], said["seed"], said["dtype"]) == ("random", 1, "float32")
    assert said["parameters"]["prefixes"] + said["parameters"]["aggregator"] == added["default"]
    assert sum(said["parameters"].values()) + added["other"] == model.num_parameters()
    assert list(said["further_streams"]) == ["other"]
    other = said["further_streams"]["other"]
    assert (other["num_streams"], other["prefix_length"], other["seed"]) == (2, 4, 2)
    assert sum(other["parameters"].values()) == added["other"]
    assert other["parameters"]["backbone"] == 0


def test_what_a_full_checkpoint_was_made_from(two_sets, tmp_path, capsys):
    """Also of one that does not say who wrote it, as the released ones."""
    folder = shutil.copytree(two_sets, tmp_path / "made")
    fields = json.loads((folder / "config.json").read_text())
    del fields["parscale_version"]
    (folder / "config.json").write_text(json.dumps(fields | {"parscale_backbone": "org/backbone"}))
    said = info(capsys, folder)
    assert (said["written_by"], said["backbone"]["made_from"]) == (None, "org/backbone")
    (folder / "config.json").write_text(json.dumps(fields | {"parscale_backbone": ["org/backbone"]}))
    assert "made_from" not in info(capsys, folder)["backbone"]


def test_streams_only(backbone, tmp_path, capsys):
    model = LlamaForCausalLM.from_pretrained(backbone)
    parscale.wrap(model, 2, init="random").save_streams(tmp_path / "streams")
    said = info(capsys, tmp_path / "streams")
    assert (said["kind"], said["written_by"]) == ("streams only", f"parscale {__version__}")
    assert said["backbone"] == {"class": "LlamaForCausalLM", "model_type": "llama", "name": str(backbone)}
    assert said["num_streams"] == 2
    assert said["parameters"]["backbone"] == 0


def test_plain_backbone(backbone, capsys):
    said = info(capsys, backbone)
    assert said["kind"] == "plain backbone"
    assert "written_by" not in said
    assert said["num_streams"] == 1
    assert said["active_streams"] is None
    assert said["dtype"] == "bfloat16"


def test_as_text(two_sets, capsys):
    assert run(["info", str(two_sets)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["num", "streams", "3"] in lines
    assert ["class", "LlamaForCausalLM"] in lines


@pytest.mark.parametrize(
    ("prepare", "complaint"),
    [
        (lambda folder: None, "There is no folder"),
        (lambda folder: folder.mkdir(), "is empty"),
        (lambda folder: folder.write_text("x"), "is a file"),
        (lambda folder: (folder.mkdir(), (folder / "notes.txt").write_text("x")), "it is not a checkpoint"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{")), "is not JSON"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{}")), "the weights are missing"),
        (
            lambda folder: (folder.mkdir(), (folder / "config.json").write_text('{"parscale_n": 4}')),
            "weights are missing",
        ),
    ],
)
def test_bad_input(tmp_path, capsys, prepare, complaint):
    prepare(tmp_path / "it")
    assert run(["info", str(tmp_path / "it")]) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
