"""`parscale generate`: the text is that of `model.generate`."""

import pytest
import torch
from transformers import AutoTokenizer

import parscale
from parscale.cli.application import run

PROMPT = "def f(x):"


def generate(capsys, *arguments: object) -> str:
    assert run(["generate", *map(str, arguments), "--device", "cpu"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("streams", [None, "off", "other"])
def test_greedy(two_sets, capsys, streams):
    model, tokenizer = parscale.load(two_sets), AutoTokenizer.from_pretrained(two_sets)
    if streams is not None:
        model.set_streams(None if streams == "off" else streams)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    expected = tokenizer.decode(
        model.generate(**inputs, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True
    )
    option = [] if streams is None else ["--streams", streams]
    assert generate(capsys, two_sets, "--prompt", PROMPT, "--max-new-tokens", 12, *option) == expected + "\n"


def test_sampling_is_repeatable(two_sets, capsys):
    given = [two_sets, "--prompt", PROMPT, "--max-new-tokens", 12, "--temperature", 1.5, "--seed"]
    first, again, other = (generate(capsys, *given, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_plain_backbone(backbone, capsys):
    assert generate(capsys, backbone, "--prompt", PROMPT, "--max-new-tokens", 3).startswith(PROMPT)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--prompt", ""], "The prompt has no tokens"),
        (["--prompt", "x", "--streams", "nothing"], "nothing"),
        (["--prompt", "x", "--device", "abacus"], "The device 'abacus' is not available"),
        (["--prompt", "x", "--device", "meta"], "The device 'meta' is not available"),
    ],
)
def test_bad_input(two_sets, capsys, options, complaint):
    assert run(["generate", str(two_sets), *options]) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(two_sets, capsys):
    assert run(["generate", str(two_sets), "--prompt", "x", "--device", "cuda"]) == 2
    assert "The device 'cuda' is not available" in capsys.readouterr().err


def test_a_set_of_streams_of_a_plain_backbone(backbone, capsys):
    assert run(["generate", str(backbone), "--prompt", "x", "--streams", "default"]) == 2
    assert "is a plain model without a set of streams 'default'" in capsys.readouterr().err


def test_without_a_tokenizer(backbone, tmp_path, capsys):
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(backbone).save_pretrained(tmp_path / "bare")
    assert run(["generate", str(tmp_path / "bare"), "--prompt", "x"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
