"""`parscale train` with held-out text and `--controls`, and `parscale eval --against`: what is printed."""

import json
import shlex
import shutil
from pathlib import Path
from statistics import fmean

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

import parscale
from parscale.checkpoints.evaluation.places import evaluate_places
from parscale.cli.application import BAD_INPUT, run

SIZES = ["--tokens", "64", "--sequence-length", "16", "--batch-size", "2", "--eval-every", "2"]


@pytest.fixture
def held_out(tmp_path):
    folder = tmp_path / "held-out"
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.py").write_text(f"def g{n}(y):\n    return y * {n}\n" * 4)
    return folder


def test_train_says_what_a_gain_has_to_beat_and_trains_it(two_sets, text_file, held_out, tmp_path, capsys, monkeypatch):
    arguments = ["train", str(two_sets), "--data", str(text_file), "--output", str(tmp_path / "run"), *SIZES]
    arguments += ["--freeze-backbone", "--eval-data", f"code={held_out}"]
    monkeypatch.setattr("sys.argv", ["parscale", *arguments])
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    assert "In the middle of code, against the untouched backbone: " in printed
    assert "is not yet a gain of streams: the backbone trained alone and one trained prefix" in printed
    command = shlex.split(printed.splitlines()[-1])
    assert command == ["parscale", *arguments, "--resume", "--controls"]
    assert not (tmp_path / "run" / "controls").exists()

    assert run(command[1:]) == 0
    printed = capsys.readouterr().out
    assert "Streams in the middle of code: " in printed
    for title in ("untouched backbone", "backbone alone", "one prefix of 5 tokens", "one prefix of 15 tokens"):
        assert title in printed
    assert "is not yet a gain" not in printed


def test_a_second_training_is_told_of_controls_by_hand(two_sets, text_file, held_out, tmp_path, capsys):
    """`--controls` would refuse it."""
    options = ["--data", str(text_file), *SIZES, "--freeze-backbone"]
    assert run(["train", str(two_sets), *options, "--output", str(tmp_path / "first")]) == 0
    second = ["train", str(tmp_path / "first"), *options, "--eval-data", f"code={held_out}"]
    assert run([*second, "--output", str(tmp_path / "second")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "is not yet a gain of streams" in last
    assert last.endswith("so --controls refuses: train each by hand in both runs.")


def test_controls_without_held_out_text(two_sets, text_file, tmp_path, capsys):
    arguments = ["train", str(two_sets), "--data", str(text_file), "--output", str(tmp_path / "run"), *SIZES]
    assert run([*arguments, "--controls"]) == BAD_INPUT
    assert "Controls are compared on held-out text; give some by --eval-data." in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_eval_against_other_checkpoints(two_sets, backbone, held_out, capsys):
    files = sorted(map(str, held_out.iterdir()))
    arguments = ["eval", str(two_sets), "--data", *files, "--against", "off", str(backbone), "--sequence-length", "16"]
    assert run([*arguments, "--device", "cpu", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["comparisons"]
    assert [(entry["baseline"], entry["where"]) for entry in entries] == [
        (name, where) for name in ("off", str(backbone)) for where in ("beginning", "middle")
    ]
    model, tokenizer = parscale.load(two_sets), AutoTokenizer.from_pretrained(two_sets)
    documents = [(path, Path(path).read_text()) for path in files]
    streams = evaluate_places(model, tokenizer, documents, sequence_length=16)
    with model.use_streams(None):
        off = evaluate_places(model, tokenizer, documents, sequence_length=16)
    for entry in entries[:2]:
        means = [fmean(document.loss for document in found[entry["where"]].documents) for found in (streams, off)]
        assert entry["difference"] == pytest.approx(means[0] - means[1], abs=1e-6)
        assert entry["low"] < entry["difference"] < entry["high"]

    assert run([*arguments, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert f"{entries[0]['difference']:+.4f} ({entries[0]['low']:+.4f}, {entries[0]['high']:+.4f})" in printed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--against", "THIS"], "cannot be compared with itself"),
        (["--against", "THIS/../THIS/"], "cannot be compared with itself"),
        (["--streams", "off", "--against", "off"], "are off already; leave 'off' out of --against"),
        (["--against", "off", "--adaptive", "1"], "leave --tasks and --adaptive out"),
        (["--against", "nowhere"], "There is no folder nowhere"),
    ],
)
def test_what_cannot_be_compared(two_sets, text_file, capsys, monkeypatch, options, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or the Hub is asked again and again
    for name in ("checkpoint_comparison.evaluate_places", "evaluation.text_loss.evaluate"):
        monkeypatch.setattr(
            f"parscale.checkpoints.{name}", lambda *_, **__: pytest.fail("measured before it was refused")
        )
    monkeypatch.chdir(two_sets.parent)
    options = [option.replace("THIS", two_sets.name) for option in options]
    assert run(["eval", two_sets.name, "--data", str(text_file), "--device", "cpu", *options]) == BAD_INPUT
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(("prompt", "left"), [(None, 64), (20, 44)])
def test_a_rival_with_fewer_positions_is_named_before_anything_is_measured(
    two_sets, backbone, text_file, tmp_path, capsys, monkeypatch, prompt, left
):
    monkeypatch.setattr(
        "parscale.checkpoints.checkpoint_comparison.evaluate_places", lambda *_, **__: pytest.fail("measured")
    )
    shorter = shutil.copytree(backbone, tmp_path / "shorter")
    config = json.loads((shorter / "config.json").read_text())
    (shorter / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    rival = shorter if prompt is None else shutil.copytree(shorter, tmp_path / "prompts")
    if prompt is not None:
        (rival / "config.json").unlink()
        model = parscale.wrap(LlamaForCausalLM.from_pretrained(shorter), 2, prefix_length=prompt, transform="prompt")
        model.save_streams(rival)
    arguments = [
        "eval",
        str(two_sets),
        "--data",
        str(text_file),
        "--device",
        "cpu",
        "--against",
        str(backbone),
        str(rival),
    ]
    assert run(arguments) == BAD_INPUT
    said = f"{rival} has positions for {left} tokens of text, and sequence_length is 128; give at most {left}, for all"
    assert said in capsys.readouterr().err
