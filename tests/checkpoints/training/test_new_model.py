"""`train` and `parscale train --from-config`: a model that does not exist yet, trained by the same engine."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from training_runs import stopped_after
from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale import ParScaleConfig, load, wrap
from parscale.checkpoints import NewModel, TrainSettings, train
from parscale.checkpoints.training import new_model
from parscale.cli.application import BAD_INPUT, run
from parscale.format.staging import staged

SIZES = ["--tokens", "256", "--sequence-length", "16", "--batch-size", "4"]


@pytest.fixture
def config(backbone, tmp_path):
    """Of a Llama of two layers, with special tokens that the tokenizer has not."""
    fields = json.loads((backbone / "config.json").read_text())
    path = tmp_path / "small.json"
    path.write_text(json.dumps(fields | {"eos_token_id": 7, "pad_token_id": 8, "dtype": "float32"}))
    return path


def by_hand(config, tokenizer, text_file, tmp_path):
    """The same model made, wrapped and saved by hand, and trained as any checkpoint."""
    from transformers import AutoConfig

    made = AutoConfig.from_pretrained(config)
    made.eos_token_id = made.pad_token_id = tokenizer.eos_token_id
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(made)
    wrap(model, 3, prefix_length=4, kv="shared", init="random", seed=3)
    model.save_pretrained(tmp_path / "untrained")
    tokenizer.save_pretrained(tmp_path / "untrained")
    rates = {"learning_rate": 1e-3, "streams_learning_rate": 1e-3}
    return train(str(tmp_path / "untrained"), tmp_path / "other", settings(text_file, **rates))


def settings(text_file, **options):
    given = {"tokens": 256, "sequence_length": 16, "batch_size": 4, "seed": 3, "eval_data": {"code": str(text_file)}}
    return TrainSettings([str(text_file)], **given | {"eval_tokens": 64, "save_every": 1} | options)


def test_a_new_model_is_trained_as_one_that_was_saved_untrained(config, backbone, text_file, tmp_path, capsys):
    """To the last bit, also resumed after an interruption; its folder says what it began as."""
    arguments = ["train", "--from-config", str(config), "--tokenizer", str(backbone), "--num-streams", "3"]
    arguments += ["--prefix-length", "4", "--kv", "shared", "--output", str(tmp_path / "run"), "--seed", "3"]
    arguments += [*SIZES, "--eval-tokens", "64", "--save-every", "1", "--eval-data", f"code={text_file}", "--json"]
    arguments += ["--data", str(text_file)]

    with stopped_after(2):
        assert run(arguments) == 130
    capsys.readouterr()
    assert run([*arguments, "--resume"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["new_model"] == {"config": str(config), "tokenizer": str(backbone), "num_streams": 3}
    assert report["streams_learning_rate"] == report["learning_rate"] == 1e-3

    tokenizer = AutoTokenizer.from_pretrained(backbone)
    expected = by_hand(config, tokenizer, text_file, tmp_path)
    assert report["losses"] == expected["losses"]
    trained, other = load(tmp_path / "run"), load(tmp_path / "other")
    assert trained.num_streams == 3
    assert trained.dtype == torch.float32
    assert trained.config.eos_token_id == tokenizer.eos_token_id
    for name, parameter in other.named_parameters():
        assert torch.equal(trained.get_parameter(name), parameter), name
    assert AutoTokenizer.from_pretrained(tmp_path / "run").eos_token == "<end>"

    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert f"| began as | random weights of `{config}` |" in card.text
    assert "Trained from nothing with `parscale`." in card.text
    assert "No gain over the backbone" not in card.text
    assert "base_model" not in card.data.to_dict()


def test_of_a_size(backbone, text_file, tmp_path, capsys, monkeypatch):
    """The run says what came out, and is resumed under the same size only; the same size makes the same model."""
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--tokenizer", str(backbone), "--num-streams", "2", "--prefix-length", "2"]
    arguments += ["--output", "run", *SIZES, "--tokens", "64", "--data", str(text_file)]
    assert run([*arguments, "--from-config", "100K"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "a Qwen2 for 100K parameters without embeddings 107,200 width 64 layers 2 mlp 192" in printed
    saved, tokenizer = json.loads(Path("run/config.json").read_text()), AutoTokenizer.from_pretrained(backbone)
    assert (saved["vocab_size"], saved["eos_token_id"]) == (len(tokenizer), tokenizer.eos_token_id)
    trained = Path("run/model.safetensors").read_bytes()
    assert "| began as | random weights of `Qwen2, 100K` |" in ModelCard.load("run/README.md").text

    Path("run/training.json").unlink()  # as if it had stopped before its end
    assert run([*arguments, "--from-config", "140K", "--resume"]) == BAD_INPUT
    assert "was started with other settings: checkpoint" in capsys.readouterr().err
    assert run([*arguments, "--from-config", "100K", "--resume", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    made = NewModel("100K", str(backbone), ParScaleConfig(2, prefix_length=2), sequence_length=16)
    assert report["new_model"] == made.described()
    assert report["new_model"]["configuration"]["max_position_embeddings"] == 2048
    assert Path("run/model.safetensors").read_bytes() == trained


def test_a_file_goes_before_a_size(config, backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = NewModel("1M", str(backbone), ParScaleConfig(1), sequence_length=5000)
    assert made.make().config.model_type == "qwen2"
    assert made.make().config.max_position_embeddings == 5000
    before = made.digest()
    config.rename("1M")
    assert made.make().config.model_type == "llama"
    assert made.digest() != before


def test_a_missing_tokenizer_is_not_the_configurations_fault(config, tmp_path):
    for size in (config, "100K"):
        with pytest.raises((ValueError, OSError), match=r"^((?!config).)*nowhere"):
            NewModel(size, str(tmp_path / "nowhere"), ParScaleConfig(1)).check()


def test_its_tokenizer_is_read_once(backbone, monkeypatch):
    """A large vocabulary takes a second each time."""
    reads, read = [], new_model.find_tokenizer
    monkeypatch.setattr(new_model, "find_tokenizer", lambda place: reads.append(place) or read(place))
    made = NewModel("100K", str(backbone), ParScaleConfig(1))
    made.check()
    assert made.make().config.eos_token_id == made.find_tokenizer().eos_token_id
    assert made.described()["configuration"]["vocab_size"] == len(made.find_tokenizer())
    assert reads == [str(backbone)]


def test_without_streams_it_is_a_plain_model(config, backbone):
    model = NewModel(config, str(backbone), ParScaleConfig(1), seed=3)
    model.check()
    made = model.make(torch.bfloat16)
    assert not hasattr(made, "parscale")
    assert made.dtype == torch.bfloat16
    again = NewModel(config, str(backbone), ParScaleConfig(1), seed=3).make(torch.bfloat16)
    other = NewModel(config, str(backbone), ParScaleConfig(1), seed=4).make(torch.bfloat16)
    assert torch.equal(made.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(made.lm_head.weight, other.lm_head.weight)
    digests = {NewModel(config, str(backbone), ParScaleConfig(P), seed).digest() for P in (1, 2) for seed in (3, 4)}
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("arguments", "changes", "said"),
    [
        (["--from-config", "gone.json"], {}, "gone.json is no file; give the config.json of a causal language model"),
        (["--from-config", "."], {}, ". is a folder; give the config.json"),
        (["--from-config", "20X"], {}, "20X is no file; give the config.json of a causal language model, or a size"),
        (["--from-config", "M"], {}, "or a size from 100K to 1T such as 20M (parameters without embeddings)."),
        (["--from-config", "0"], {}, "A new model cannot have 0 parameters; give a size from 100K to 1T such as 20M"),
        (["--from-config", "-5M"], {}, "A new model cannot have -5M parameters; give a size from 100K to 1T"),
        (["--from-config", "nan"], {}, "A new model cannot have nan parameters; give a size from 100K to 1T"),
        (["--from-config", "99K"], {}, "A new model cannot have 99K parameters; give a size from 100K to 1T"),
        (["--from-config", "1001B"], {}, "A new model cannot have 1001B parameters; give a size from 100K to 1T"),
        ([], {"vocab_size": 256}, "has 257 tokens, and vocab_size of small.json is 256; set it to 257 or more"),
        ([], {"parscale_n": 2}, "small.json is of a model with streams; give that of its backbone"),
        ([], {"quantization_config": {"quant_method": "fp8"}}, "small.json is of a quantized model"),
        ([], {"model_type": "llamma"}, "config.json of small.json does not describe a model"),
        ([], {"hidden_size": "wide"}, "config.json of small.json does not describe a model"),
        ([], "[", "small.json is not JSON"),
        (["--freeze-backbone"], {}, "A new model's backbone has random weights"),
        (["--lora-rank", "2"], {}, "A new model's backbone has random weights"),
        (["--kv", "mixed"], {}, "kv must be one of 'own', 'shared', got 'mixed'"),
        (["--num-streams", "0"], {}, "num_streams must be at least 1, got 0"),
    ],
)
def test_what_no_model_can_be_made_of(
    config, backbone, text_file, tmp_path, monkeypatch, capsys, arguments, changes, said
):
    monkeypatch.chdir(tmp_path)
    with staged(tmp_path / "tokenizer", last="tokenizer.json", new=True) as folder:
        AutoTokenizer.from_pretrained(backbone).save_pretrained(folder)
    text = changes if isinstance(changes, str) else json.dumps(json.loads(config.read_text()) | changes)
    config.write_text(text)
    given = ["--from-config", "small.json", "--tokenizer", "tokenizer", "--num-streams", "2", "--output", "run"]
    assert run(["train", *given, *SIZES, *arguments, "--data", str(text_file)]) == BAD_INPUT
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Missing argument 'CHECKPOINT', or --from-config for a new model"),
        (["there", "--num-streams", "2"], "--num-streams is of a new model: give --from-config with it"),
        (["there", "--tokenizer", "there"], "--tokenizer is of a new model: give --from-config with it"),
        (["there", "--from-config", "a.json"], "--from-config makes a new model, and there is one; give one of the"),
        (["--from-config", "a.json", "--num-streams", "2"], "--from-config needs --tokenizer and --num-streams"),
        (["--from-config", "a.json", "--tokenizer", "there"], "--from-config needs --tokenizer and --num-streams"),
    ],
)
def test_a_checkpoint_or_a_new_model(tmp_path, capsys, arguments, said):
    options = ["--output", str(tmp_path / "run"), "--data", "a.txt"]
    assert run(["train", *arguments, *options]) == BAD_INPUT
    assert said in capsys.readouterr().err


def test_several_texts_and_no_checkpoint(tmp_path, capsys):
    """What follows the first text is no checkpoint where none is to be given."""
    options = ["--from-config", "a.json", "--data", "a.txt", "b.txt", "--output", str(tmp_path / "run")]
    assert run(["train", *options]) == BAD_INPUT
    assert "--from-config needs --tokenizer" in capsys.readouterr().err
