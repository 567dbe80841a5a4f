"""Texts that no tokenizer reads, and tokens that the model does not know, are named in one line by every command."""

import json
import os
import re
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from parscale import wrap
from parscale.checkpoints.conversion.convert import calibration_ids
from parscale.checkpoints.evaluation.diagnosis import diagnose
from parscale.checkpoints.evaluation.text_loss import evaluate
from parscale.checkpoints.quickstart import run as quickstart
from parscale.checkpoints.quickstart.run import QuickstartTexts
from parscale.checkpoints.texts.sources import open_source
from parscale.checkpoints.texts.token_ids import encode, only_known_ids, require_text
from parscale.checkpoints.training.packing import Encoder, pack_documents
from parscale.cli.application import BAD_INPUT, run

TASKS = Path(__file__).parents[2] / "data" / "lm_eval"
KNOWN = 64  # of the 257 tokens of the tokenizer
OTHER = rf"gives the token id \d+, but the model has only {KNOWN} ids: it is the tokenizer of another model"


@pytest.fixture(scope="module")
def other(byte_tokenizer, tmp_path_factory):
    """A checkpoint whose tokenizer knows more tokens than its model."""
    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=KNOWN, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text("Some words that are letters. " * 20)
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "MODEL", "--data", "TEXT", "--output", "OUT", "--sequence-length", "16"],
        ["eval", "MODEL", "--data", "TEXT"],
        ["eval", "MODEL", "--tasks", str(TASKS / "prose.yaml")],
        ["generate", "MODEL", "--prompt", "letters"],
        ["convert", "MODEL", "OUT", "--num-streams", "2", "--prefix-length", "4", "--calibration", "TEXT"],
    ],
    ids=lambda arguments: arguments[0] + arguments[2],
)
def test_every_command_names_a_tokenizer_of_another_model(other, prose, tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    places = {"MODEL": str(other), "TEXT": str(prose), "OUT": str(tmp_path / "out")}
    assert run([places.get(argument, argument) for argument in arguments]) == BAD_INPUT
    printed = capsys.readouterr()
    assert len(re.findall(f"parscale: The tokenizer {OTHER}.*\n", printed.err)) == 1
    assert "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


def test_diagnosis_and_quickstart_name_a_tokenizer_of_another_model(other, tmp_path):
    documents = [("a", "some letters and more")]
    model = wrap(LlamaForCausalLM.from_pretrained(other), 2, prefix_length=2, init="random")
    with pytest.raises(ValueError, match=OTHER):
        diagnose(model, AutoTokenizer.from_pretrained(other), documents)
    texts = QuickstartTexts(documents, {quickstart.CODE: documents})
    with pytest.raises(ValueError, match=OTHER):
        quickstart.run_quickstart(tmp_path / "out", model_path=other, texts=texts)
    assert not (tmp_path / "out").exists()


def test_a_model_that_refuses_ids_computes_the_same_and_is_left_as_it_was(backbone):
    model = AutoModelForCausalLM.from_pretrained(backbone)
    ids = torch.arange(12).view(2, 6)
    before = model(ids).logits
    with only_known_ids(model):
        assert torch.equal(model(ids).logits, before)
        with pytest.raises(ValueError, match="token id 257, but the model has only 257 ids"):
            model(ids + 246)
    assert not model.get_input_embeddings()._forward_pre_hooks


HALF = ("a:3", "cut emoji \ud83d here")
SAID = re.escape("a:3: character 11 is '\\ud83d', half of a character")


def test_half_a_character_reaches_no_tokenizer(backbone, byte_tokenizer):
    model = wrap(AutoModelForCausalLM.from_pretrained(backbone), 2, prefix_length=2, init="random")
    documents = [("a:1", "fine"), HALF]
    for use in (
        lambda: encode(documents, byte_tokenizer),
        lambda: list(Encoder(byte_tokenizer, 257)(documents)),
        lambda: pack_documents(documents, byte_tokenizer, 4),
        lambda: evaluate(model, byte_tokenizer, documents),
        lambda: diagnose(model, byte_tokenizer, documents),
        lambda: calibration_ids(documents, byte_tokenizer, 1, 2),
    ):
        with pytest.raises(ValueError, match=SAID):
            use()


@pytest.mark.parametrize("text", ["", "plain", "\U0001f600 whole", "\0\x1b\ufeff\uffff"])
def test_a_text_is_one(text):
    assert require_text("here", text) == text


@pytest.mark.parametrize("text", ["\ud83d", "x\ude00\ud83d", "caf\udce9"])
def test_other_halves_are_none(text):
    with pytest.raises(ValueError, match=r"^here: character \d is '.*', half of a character or a byte that is not UTF"):
        require_text("here", text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "MODEL", "--data", "FILE", "--output", "OUT", "--sequence-length", "16"],
        ["eval", "MODEL", "--data", "FILE"],
        ["diagnose", "MODEL", "--data", "FILE"],
        ["convert", "MODEL", "OUT", "--num-streams", "2", "--prefix-length", "4", "--calibration", "FILE"],
        ["generate", "MODEL", "--prompt", os.fsdecode(b"caf\xe9")],
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_every_command_names_the_row(backbone, tmp_path, capsys, arguments, ending):
    path = tmp_path / f"a.{ending}"
    path.write_text('{"text": "whole"}\n' * 20 + json.dumps({"text": HALF[1]}))
    places = {"MODEL": str(backbone), "FILE": str(path), "OUT": str(tmp_path / "out")}
    assert run([places.get(argument, argument) for argument in arguments]) == BAD_INPUT
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    where = "The prompt" if arguments[0] == "generate" else f"{path}, {'row' if ending == 'json' else 'line'} 21"
    assert printed.err.startswith(f"parscale: {where}: character ")
    assert sorted(os.listdir(tmp_path)) == [path.name]


def test_the_row_of_a_dataset_is_named(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: [{"text": "fine"}, {"text": "\ud83d"}])
    with pytest.raises(ValueError, match=re.escape("wikitext, row 2: character 1 is '\\ud83d'")):
        list(open_source("wikitext"))


def test_a_prompt_from_a_file_has_no_byte_order_mark(backbone, capsys):
    for prompt in ("def f(x):", "\ufeffdef f(x):"):
        assert run(["generate", str(backbone), "--prompt", prompt, "--max-new-tokens", "3", "--device", "cpu"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
