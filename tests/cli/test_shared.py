"""Streams that share keys and values, from the command line: converted, described, trained, resumed, evaluated."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from training_runs import stopped_after
from transformers import AutoTokenizer, LlamaForCausalLM

import parscale
from parscale.cli.application import BAD_INPUT, INTERRUPTED, run

SIZES = ["--tokens", "0.192K", "--sequence-length", "16", "--batch-size", "4"]


@pytest.fixture(scope="module")
def shared(backbone, tmp_path_factory):
    """Three streams that share keys and values, in float32, and a set of two that does not; tests only read it."""
    folder = tmp_path_factory.mktemp("shared") / "folder"
    model = LlamaForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    parscale.wrap(model, 3, prefix_length=5, init="random", seed=1, kv="shared")
    model.add_streams("own", 2, prefix_length=4, init="random", seed=2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    return folder


def test_convert_and_info(backbone, text_file, tmp_path, capsys):
    options = ["--num-streams", "3", "--prefix-length", "5", "--kv", "shared", "--calibration", str(text_file)]
    assert run(["convert", str(backbone), str(tmp_path / "new"), *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kv"], report["num_streams"], report["init"]) == ("shared", 3, "documents")
    assert report["parameters"]["prefixes"] == 2 * 2 * 2 * 2 * 5 * 8  # layers, keys and values, P - 1, G, T, D
    assert {tuple(x.shape) for n, x in load_file(tmp_path / "new" / "model.safetensors").items() if "prefix" in n} == {
        (2, 2, 5, 8)
    }
    assert run(["info", str(tmp_path / "new"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv"] == "shared"
    options = ["--num-streams", "3", "--kv", "both"]
    assert run(["convert", str(backbone), str(tmp_path / "other"), *options]) == BAD_INPUT
    assert capsys.readouterr().err.count("kv must be one of 'own', 'shared', got 'both'") == 1
    assert not (tmp_path / "other").exists()


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(shared, text_file, tmp_path):
    common = ["train", str(shared), "--data", str(text_file), *SIZES, "--freeze-backbone", "--seed", "3"]
    assert run([*common, "--output", str(tmp_path / "whole")]) == 0
    with stopped_after(1):
        assert run([*common, "--output", str(tmp_path / "parts")]) == INTERRUPTED
    assert run([*common, "--output", str(tmp_path / "parts"), "--resume"]) == 0
    whole, parts, before = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", tmp_path / "parts", shared)
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    moved = {name for name in whole if not torch.equal(whole[name], before[name])}
    assert moved == {name for name in whole if "prefix_" in name or "aggregate_layer" in name}
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "once as it is and then each time behind a learned prefix" in card
    assert "the cache holds the backbone's keys and values, which all streams read" in card


def loss_by_hand(folder, text_file, threshold=None):
    """The loss in one window of the whole text, the share of tokens with all streams, and the threshold.

    Without one it is the median of the entropies.
    """
    model = parscale.load(folder)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(text_file.read_text())["input_ids"]])
    with torch.no_grad():
        mixed = model(ids).logits[0, :-1].double()
        with model.use_streams(None):
            alone = model(ids).logits[0, :-1].double()
    probabilities = alone.softmax(-1)
    entropies = -(probabilities * probabilities.log()).sum(-1)
    threshold = entropies.median().item() if threshold is None else threshold
    uncertain = entropies > threshold
    logits = torch.where(uncertain[:, None], mixed, alone)
    return cross_entropy(logits, ids[0, 1:]).item(), uncertain.double().mean().item(), threshold


@pytest.fixture
def short(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("def f(x):\n    return x + 1\n" * 3)
    return path


def test_eval_with_streams_for_uncertain_tokens(shared, short, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("def g(x): pass")  # in one batch with a longer window, and padded
    command = ["eval", str(shared), "--device", "cpu", "--json", "--data"]
    expected, share, threshold = loss_by_hand(shared, short)
    threshold += 1e-4  # apart from the median itself, whose last bits do not count
    assert 0.1 < share < 0.9  # or it would show nothing
    assert run([*command, str(short), "--adaptive", str(threshold)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["loss"] == pytest.approx(expected, rel=1e-5)
    assert figures["mean_streams"] == pytest.approx(1 + 2 * share)
    assert figures["adaptive"] == threshold
    _, second, _ = loss_by_hand(shared, other, threshold)
    assert run([*command, str(short), str(other), "--adaptive", str(threshold)]) == 0
    both, sizes = json.loads(capsys.readouterr().out), (short.stat().st_size - 1, other.stat().st_size - 1)
    mean = 1 + 2 * (share * sizes[0] + second * sizes[1]) / sum(sizes)
    assert both["mean_streams"] == pytest.approx(mean)


def test_the_ends_of_the_scale_are_all_streams_and_none(shared, short, capsys):
    command = ["eval", str(shared), "--data", str(short), "--device", "cpu", "--json"]
    losses = {}
    for options in ([], ["--streams", "off"], ["--adaptive", "0"], ["--adaptive", "inf"]):
        assert run([*command, *options]) == 0
        losses[" ".join(options)] = json.loads(capsys.readouterr().out)
    assert losses["--adaptive 0"]["loss"] == losses[""]["loss"]
    assert losses["--adaptive inf"]["loss"] == losses["--streams off"]["loss"]
    assert (losses["--adaptive 0"]["mean_streams"], losses["--adaptive inf"]["mean_streams"]) == (3, 1)
    assert losses["--adaptive inf"]["adaptive"] == "inf"
    assert "mean_streams" not in losses[""]
    assert not math.isclose(losses[""]["loss"], losses["--streams off"]["loss"], rel_tol=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--streams", "own", "--adaptive", "1"], "'own' is P = 2, own"),
        (["--streams", "off", "--adaptive", "1"], "none are active"),
        (["--adaptive", "-1"], "an entropy in nats"),
        (["--adaptive", "nan"], "an entropy in nats"),
    ],
)
def test_eval_refuses(options, said, shared, short, capsys):
    assert run(["eval", str(shared), "--data", str(short), "--device", "cpu", *options]) == BAD_INPUT
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1


def test_diagnose_proposes_what_eval_takes(shared, short, capsys):
    about = ["--data", str(short), "--device", "cpu", "--json"]
    assert run(["diagnose", str(shared), *about, "--share", "0.4"]) == 0
    proposal = json.loads(capsys.readouterr().out)["proposal"]
    assert run(["eval", str(shared), *about, "--adaptive", str(proposal["threshold"])]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["mean_streams"] == pytest.approx(proposal["mean_streams"])
    assert figures["share_of_tokens"] == pytest.approx(proposal["share"])
    assert figures["loss"] == pytest.approx(proposal["loss"], rel=1e-4)
    assert run(["diagnose", str(shared), *about[:-1], "--share", "0.4"]) == 0
    assert "For all streams on 40 % of the tokens, take adaptive =" in capsys.readouterr().out


@pytest.mark.parametrize(("threshold", "streams"), [("0", 3), ("inf", 1), ("3.9", None)])
def test_generate_with_streams_for_uncertain_tokens(shared, threshold, streams, capsys):
    model, tokenizer = parscale.load(shared), AutoTokenizer.from_pretrained(shared)
    options = {"max_new_tokens": 9, "do_sample": False}
    ids = tokenizer("def f(x):", return_tensors="pt").input_ids
    with model.use_streams(None if streams == 1 else "default"):
        adaptive = {} if streams else {"adaptive": float(threshold)}
        expected = tokenizer.decode(model.generate(ids, **options, **adaptive)[0], skip_special_tokens=True)
    command = ["generate", str(shared), "--prompt", "def f(x):", "--max-new-tokens", "9", "--device", "cpu"]
    assert run([*command, "--adaptive", threshold]) == 0
    printed = capsys.readouterr()
    assert printed.out == expected + "\n"
    mean = streams or model.last_mean_streams
    assert printed.err.splitlines()[-1] == f"Streams for a token on average: {mean:.2f} of 3."


def test_generate_refuses(shared, capsys):
    command = ["generate", str(shared), "--prompt", "x", "--streams", "own", "--adaptive", "1"]
    assert run(command) == BAD_INPUT
    assert "'own' is P = 2, own" in capsys.readouterr().err
