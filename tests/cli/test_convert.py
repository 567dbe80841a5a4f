"""`parscale convert`: what it writes, and what it refuses."""

import json
import shutil

import pytest
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import parscale
from parscale.checkpoints.conversion import convert as conversion
from parscale.checkpoints.conversion.convert import calibration_ids
from parscale.checkpoints.models import find_tokenizer
from parscale.cli.application import run

TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
FULL_FILES = {"config.json", "generation_config.json", "model.safetensors", "modeling_parscale.py", *TOKENIZER_FILES}


def convert(*arguments: object) -> int:
    return run(["convert", *map(str, arguments)])


def files(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_full_checkpoint(backbone, tmp_path, capsys):
    output = tmp_path / "new" / "output"
    given = ["--num-streams", 3, "--prefix-length", 5, "--smoothing", 0.2, "--init", "random", "--seed", 7]
    assert convert(backbone, output, *given, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    model = parscale.load(output)
    assert files(output) == FULL_FILES
    assert {path.name for path in output.parent.iterdir()} == {"output"}
    assert model.num_streams == report["num_streams"] == 3
    assert (report["prefix_length"], report["smoothing"], report["init"], report["seed"]) == (5, 0.2, "random", 7)
    assert report["kind"] == "full"
    assert report["dtype"] == "bfloat16"
    assert model.dtype == torch.bfloat16
    # 2 layers, keys and values, P * G * T * D; then P*H*H + H + H*P + P
    assert report["parameters"]["prefixes"] == 2 * 2 * 3 * 2 * 5 * 8
    assert report["parameters"]["aggregator"] == 3 * 32 * 32 + 32 + 32 * 3 + 3
    assert report["parameters"]["backbone"] == sum(
        tensor.numel() for tensor in load_file(backbone / "model.safetensors").values()
    )
    assert report["bytes"] == sum(path.stat().st_size for path in output.iterdir())
    backbone_tensors = load_file(backbone / "model.safetensors")
    saved = load_file(output / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in backbone_tensors.items())
    assert (
        AutoTokenizer.from_pretrained(output)("def")["input_ids"]
        == AutoTokenizer.from_pretrained(backbone)("def")["input_ids"]
    )


def test_streams_only(backbone, tmp_path, capsys):
    output = tmp_path / "streams"
    assert convert(backbone, output, "--num-streams", 2, "--init", "random", "--streams-only", "--json") == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "streams only"
    assert files(output) == {"parscale_config.json", "streams.safetensors", *TOKENIZER_FILES}
    assert parscale.load(output).num_streams == 2


def test_a_checkpoint_in_another_dtype(backbone, tmp_path, capsys):
    """The backbone's bfloat16 values are the same in float32, and all that is loaded and written stays in that."""
    output = tmp_path / "wide"
    given = ["--num-streams", 2, "--prefix-length", 5, "--dtype", "float32"]
    assert convert(backbone, output, *given, "--seed", 3, "--json") == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "float32"
    assert json.loads((output / "config.json").read_text())["dtype"] == "float32"
    source, saved = (load_file(folder / "model.safetensors") for folder in (backbone, output))
    assert {tensor.dtype for tensor in source.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all(torch.equal(saved[name], tensor.float()) for name, tensor in source.items())
    prefixes = [tensor for name, tensor in saved.items() if "prefix_" in name]
    assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in prefixes)
    assert {parameter.dtype for parameter in parscale.load(output).parameters()} == {torch.float32}


def test_values_that_a_dtype_cannot_hold(damaged, tmp_path, capsys):
    weights = damaged / "model.safetensors"
    save_file(
        {name: tensor * (1e6 if "norm" in name else 1) for name, tensor in load_file(weights).items()},
        weights,
        metadata={"format": "pt"},
    )
    given = [damaged, tmp_path / "output", "--num-streams", 2, "--init", "random", "--dtype"]
    refused(capsys, tmp_path, *given, "float16", complaint="has values that are too large for float16, or not finite")


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_a_source_that_no_dtype_mends(damaged, tmp_path, capsys, dtype):
    weights = damaged / "model.safetensors"
    tensors = load_file(weights)
    next(tensor for name, tensor in tensors.items() if "norm" in name)[0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    given = [damaged, tmp_path / "output", "--num-streams", 2, "--init", "random"]
    given += [] if dtype is None else ["--dtype", dtype]
    refused(capsys, tmp_path, *given, complaint=f"holds values that are not finite: {damaged} is damaged")


def test_seed_repeats(backbone, tmp_path):
    for name in ("a", "b"):
        assert convert(backbone, tmp_path / name, "--num-streams", 2, "--init", "random", "--seed", 3) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_empty_folder_is_filled(backbone, tmp_path):
    output = tmp_path / "empty"
    output.mkdir()
    assert convert(backbone, output, "--num-streams", 2, "--init", "random") == 0
    assert files(output) == FULL_FILES


def test_calibration_reaches_wrap(backbone, tmp_path, text_file, monkeypatch):
    seen = []
    wrap = conversion.wrap
    monkeypatch.setattr(conversion, "wrap", lambda *args, **kwargs: seen.append(kwargs) or wrap(*args, **kwargs))
    given = ["--num-streams", 3, "--prefix-length", 5, "--init", "context"]
    other = tmp_path / "other.py"
    other.write_text("import os\n")
    assert convert(backbone, tmp_path / "output", *given, "--calibration", text_file, other) == 0
    calibration = seen[0]["calibration"]
    assert calibration.shape == (3, 5)
    assert len({tuple(row) for row in calibration.tolist()}) == 3


def test_calibration_pieces_are_spread_over_the_text():
    def tokenizer(texts, **_):
        return {"input_ids": [[int(digit) for digit in text] for text in texts]}

    ids = calibration_ids([("a", "0123456"), ("b", "789")], tokenizer, num_streams=3, prefix_length=2)
    assert ids.tolist() == [[0, 1], [3, 4], [6, 7]]
    exact = calibration_ids([("a", "012345")], tokenizer, num_streams=3, prefix_length=2)
    assert exact.tolist() == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ValueError, match="holds 5 tokens, but 3 streams of 2 tokens need 6"):
        calibration_ids([("a", "01234")], tokenizer, num_streams=3, prefix_length=2)


@pytest.fixture
def damaged(backbone, tmp_path):
    """A copy of the backbone to damage."""
    return shutil.copytree(backbone, tmp_path / "damaged")


def refused(capsys, tmp_path, *arguments: object, complaint: str) -> None:
    """One line on standard error, exit code 2, and nothing written: `output` stays as it was."""
    before = sorted(tmp_path.rglob("*"))
    assert convert(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1, printed.err
    assert complaint in printed.err
    assert printed.out == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--num-streams", 0], "num_streams must be at least 1, got 0"),
        (["--num-streams", -2], "num_streams must be at least 1, got -2"),
        (["--num-streams", 10**9, "--init", "random"], "Out of memory; choose fewer streams"),  # terabytes
        (["--num-streams", 10**22], "num_streams must be at most 1000000000000000, got 1"),
        (["--num-streams", 2, "--prefix-length", 10**18], "prefix_length must be at most 1000000000000000, got 1"),
        (["--num-streams", 2, "--transform", "lora", "--rank", 10**22], "rank must be at most 1000000000000000, got 1"),
        (["--num-streams", 2, "--prefix-length", 0], "prefix_length must be at least 1, got 0"),
        (["--num-streams", 2, "--smoothing", 1.5], "smoothing must be between 0 and 1, got 1.5"),
        (["--num-streams", 2, "--smoothing", "nan"], "smoothing must be between 0 and 1, got nan"),
        (["--num-streams", 2, "--init", "zeros"], "init must be one of 'context', 'documents', 'random', got 'zeros'"),
        (["--num-streams", 2, "--seed", -1], "'--seed'"),
        (["--num-streams", 2, "--calibration", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--num-streams", 1, "--calibration", "nowhere.txt"], "one stream is the backbone; omit it"),
        (["--num-streams", 2, "--dtype", "int8"], "dtype is 'int8', and must be 'float32', 'bfloat16', 'float16'"),
        (["--num-streams", 2, "--dtype", "float32", "--streams-only"], "leave one of dtype and streams_only out"),
        (["--num-streams", 2, "--rank", 4], "--rank is of --transform lora, and the transform is prefix; omit one"),
    ],
)
def test_bad_options(backbone, tmp_path, capsys, options, complaint):
    refused(capsys, tmp_path, backbone, tmp_path / "output", *options, complaint=complaint)


def test_one_stream_has_none_of_the_settings_of_several(backbone, tmp_path, capsys):
    assert convert(backbone, tmp_path / "output", "--num-streams", 1, "--prefix-length", 7, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    fields = ("transform", "prefix_length", "smoothing", "init", "seed")
    assert [report[name] for name in fields] == [None] * 5
    assert report["num_streams"] == 1


def test_a_checkpoint_of_one_stream_says_how_it_becomes_a_plain_model(backbone, tmp_path, capsys):
    one, plain = tmp_path / "one", tmp_path / "plain"
    assert convert(backbone, one, "--num-streams", 1) == 0
    capsys.readouterr()
    line = f"parscale.unwrap(parscale.load({str(one)!r})).save_pretrained(FOLDER)"
    given = ["--num-streams", 2, "--init", "random"]
    refused(capsys, tmp_path, one, tmp_path / "output", *given, complaint=line)
    eval(line, {"parscale": parscale, "FOLDER": plain})
    assert convert(plain, tmp_path / "output", *given) == 0


def test_calibration_for_a_random_start(backbone, tmp_path, text_file, capsys):
    options = ["--num-streams", 2, "--init", "random", "--calibration", text_file]
    refused(
        capsys, tmp_path, backbone, tmp_path / "output", *options, complaint="Calibration text is for init 'context'"
    )


def test_too_little_calibration(backbone, tmp_path, text_file, capsys):
    text_file.write_text("short")
    options = ["--num-streams", 2, "--prefix-length", 5, "--init", "context", "--calibration", text_file]
    complaint = "holds 5 tokens, but 2 streams of 5 tokens need 10"
    refused(capsys, tmp_path, backbone, tmp_path / "output", *options, complaint=complaint)


def test_calibration_that_is_not_text(backbone, tmp_path, text_file, capsys):
    text_file.write_bytes(b"abc\xff\xfe")
    options = ["--num-streams", 2, "--init", "context", "--calibration", text_file]
    refused(capsys, tmp_path, backbone, tmp_path / "output", *options, complaint="is not text in UTF-8: byte 3")


def test_output_that_holds_something(backbone, tmp_path, capsys):
    output = tmp_path / "output"
    output.mkdir()
    (output / "mine.txt").write_text("keep")
    refused(
        capsys, tmp_path, backbone, output, "--num-streams", 2, complaint=f"The output folder {output} is not empty"
    )


def test_output_that_is_a_file(backbone, tmp_path, text_file, capsys):
    refused(capsys, tmp_path, backbone, text_file, "--num-streams", 2, complaint="is a file; give a folder")


def test_output_below_a_file(backbone, tmp_path, text_file, capsys):
    refused(capsys, tmp_path, backbone, text_file / "output", "--num-streams", 2, complaint="Not a directory")


def test_source_that_is_missing(tmp_path, capsys):
    source = tmp_path / "nowhere"
    refused(capsys, tmp_path, source, tmp_path / "output", "--num-streams", 2, complaint=f"There is no folder {source}")


def test_source_that_is_empty(tmp_path, capsys):
    source = tmp_path / "empty"
    source.mkdir()
    refused(
        capsys, tmp_path, source, tmp_path / "output", "--num-streams", 2, complaint=f"The folder {source} is empty"
    )


def test_source_that_has_streams(two_sets, tmp_path, capsys):
    complaint = "already has streams (full)"
    refused(capsys, tmp_path, two_sets, tmp_path / "output", "--num-streams", 2, complaint=complaint)


def test_source_without_attention(tmp_path, capsys):
    from transformers import MambaConfig, MambaForCausalLM

    source = tmp_path / "mamba"
    MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4)).save_pretrained(
        source
    )
    capsys.readouterr()
    refused(
        capsys, tmp_path, source, tmp_path / "output", "--num-streams", 2, "--init", "random", complaint="attention"
    )


def test_source_that_is_cut_short(damaged, tmp_path, capsys):
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(capsys, tmp_path, damaged, tmp_path / "output", "--num-streams", 2, complaint="truncated")


def test_source_with_a_pickle(damaged, tmp_path, capsys):
    weights = damaged / "model.safetensors"
    torch.save(load_file(weights), damaged / "pytorch_model.bin")
    weights.unlink()
    refused(capsys, tmp_path, damaged, tmp_path / "output", "--num-streams", 2, complaint="safetensors only")


def test_source_that_lacks_a_tensor(damaged, tmp_path, capsys):
    weights = damaged / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    complaint = "lacks model.layers.1.mlp.up_proj.weight"
    refused(capsys, tmp_path, damaged, tmp_path / "output", "--num-streams", 2, complaint=complaint)


def test_source_whose_streams_would_not_be_numbers(damaged, tmp_path, text_file, capsys):
    weights, output = damaged / "model.safetensors", tmp_path / "output"
    tensors = load_file(weights)
    tensors["model.layers.1.self_attn.v_proj.weight"][0] = 3e38  # a number, but too large to multiply
    save_file(tensors, weights, metadata={"format": "pt"})
    assert convert(damaged, output, "--num-streams", 2, "--prefix-length", 4, "--calibration", text_file) == 2
    said = capsys.readouterr().err.splitlines()[-1]  # after a warning that such a start is not exact
    assert "prefix_v would start with values that are not finite" in said
    assert not output.exists()


def test_source_of_another_shape_than_its_config_says(damaged, tmp_path, capsys):
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    refused(capsys, tmp_path, damaged, tmp_path / "output", "--num-streams", 2, complaint="do not fit its config.json")


@pytest.mark.parametrize("contents", ["{", "[]", "{}", '{"model_type": "no such model"}'])
def test_source_with_a_senseless_config(damaged, tmp_path, capsys, contents):
    (damaged / "config.json").write_text(contents)
    refused(capsys, tmp_path, damaged, tmp_path / "output", "--num-streams", 2, complaint="")


def test_source_with_a_tensor_too_many(damaged, tmp_path, capsys):
    """It is left out, and said so."""
    weights = damaged / "model.safetensors"
    save_file(load_file(weights) | {"extra": torch.zeros(1)}, weights, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="holds extra, which a LlamaForCausalLM does not use"):
        conversion.convert(str(damaged), tmp_path / "output", parscale.ParScaleConfig(2, init="random"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_is_left_when_saving_stops(backbone, tmp_path, capsys, monkeypatch, error):
    """Interrupted, or the disk is full, after part of the files was written."""
    from transformers import LlamaForCausalLM

    def stops(self, folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", stops)
    code = convert(backbone, tmp_path / "output", "--num-streams", 2, "--init", "random")
    assert code == (130 if error is KeyboardInterrupt else 2)
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "interrupted" in printed or "No space left on device" in printed


def test_an_encoder(tmp_path, capsys):
    """Of the class that it was saved from; what is for text that it does not write says so."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **sizes)).eval()
    plain.save_pretrained(tmp_path / "plain")
    arguments = ["convert", str(tmp_path / "plain"), str(tmp_path / "wide"), "--num-streams", "2", "--json"]
    assert run(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backbone"] == "BertForMaskedLM"
    assert report["init"] == "random"
    model, ids = parscale.load(tmp_path / "wide"), torch.arange(12).view(2, 6)
    assert type(model) is transformers.BertForMaskedLM
    with torch.no_grad(), model.use_streams(None):
        assert torch.equal(model(ids).logits, plain(ids).logits)
    assert run(["info", str(tmp_path / "wide"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backbone"]["class"] == "BertForMaskedLM"
    (tmp_path / "text.txt").write_text("text")
    for command in (["eval", "--data", str(tmp_path / "text.txt")], ["generate", "--prompt", "x"]):
        assert run([command[0], str(tmp_path / "wide"), *command[1:]]) == 2
        assert "holds a BertForMaskedLM, but this is for causal language models" in capsys.readouterr().err


def test_what_prepares_images_comes_along(tmp_path):
    """A ViT has no tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(image_size=8, patch_size=4, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "plain")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (tmp_path / "plain" / "preprocessor_config.json").write_text(json.dumps(processor))
    assert convert(tmp_path / "plain", tmp_path / "wide", "--num-streams", 2) == 0
    assert json.loads((tmp_path / "wide" / "preprocessor_config.json").read_text()) == processor
    assert files(tmp_path / "wide") == files(tmp_path / "plain") | {"modeling_parscale.py"}
    assert type(parscale.load(tmp_path / "wide")) is transformers.ViTForImageClassification


@pytest.mark.parametrize(("held", "read"), [(["config.json"], False), (["config.json", "vocab.txt"], True)])
def test_a_tokenizer_on_the_hub_is_read_where_there_is_one(monkeypatch, tmp_path, held, read):
    def download(repo, name):
        if name not in held:
            raise EntryNotFoundError(f"{repo} has no {name}")
        return tmp_path / name

    monkeypatch.setattr("parscale.format.folders.hf_hub_download", download)
    monkeypatch.setattr("parscale.checkpoints.models.read_pretrained", lambda reader, name: f"that of {name}")
    assert find_tokenizer("org/model") == ("that of org/model" if read else None)


@pytest.mark.parametrize("transform", ["prompt", "lora"])
def test_transforms(backbone, tmp_path, capsys, transform):
    arguments = ["--num-streams", "2", "--transform", transform, "--json"]
    arguments += {"prompt": ["--prefix-length", "4"], "lora": ["--rank", "3"]}[transform]
    assert convert(backbone, tmp_path / "wide", *arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["transform"] == transform
    assert report["init"] == {"prompt": "documents", "lora": "random"}[transform]
    assert report.get("prefix_length", report.get("rank")) == {"prompt": 4, "lora": 3}[transform]
    active = parscale.load(tmp_path / "wide").parscale.active
    own = sum(parameter.numel() for parameter in active.transform.parameters())
    assert report["parameters"][{"prompt": "prompts", "lora": "low_rank"}[transform]] == own > 0
