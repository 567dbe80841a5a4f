"""What cannot be exported is refused with the reason, and nothing is written."""

import importlib.util
import json

import pytest
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)

import parscale
from parscale.cli.application import run
from parscale.errors import UnsupportedModelError
from parscale.export.decoder import cache_shape
from parscale.export.genai import longest_text
from parscale.export.onnx import export_onnx


def refused(source, folder, match, error=ValueError, **options):
    output = folder / "output"
    with pytest.raises(error, match=match):
        export_onnx(str(source), output, **options)
    assert not list(folder.iterdir())


def test_an_unknown_dtype(saved, tmp_path):
    refused(saved("llama", 2)[1], tmp_path, "'float32', 'float16', 'int8', 'int4', got 'int2'", dtype="int2")


def test_a_missing_package(saved, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    refused(saved("llama", 2)[1], tmp_path, r"needs onnxscript: pip install 'parscale\[onnx\]'")


def test_an_encoder(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    parscale.wrap(BertModel(BertConfig(vocab_size=32, **sizes)), 2, init="random").save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="causal language models"):
        export_onnx(str(tmp_path / "source"), tmp_path / "output")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_streams_that_begin_with_a_prompt(saved, tmp_path):
    refused(saved("llama", 2, transform="prompt")[1], tmp_path, "prompt", UnsupportedModelError)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen3_next", "carry a state"),
        ("deepseek_v3", "different shapes"),
        pytest.param("gpt_oss", "s_aux", marks=pytest.mark.nightly),
    ],
)
def test_models_that_no_runtime_for_decoders_knows(family, reason, saved, tmp_path):
    refused(saved(family, 1)[1], tmp_path, reason, UnsupportedModelError)


def test_a_model_that_states_no_length_of_context(tmp_path):
    config = BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    parscale.wrap(BloomForCausalLM(config), 2, prefix_length=2, init="random").save_pretrained(tmp_path / "source")
    with pytest.raises(UnsupportedModelError, match=r"bloom states no length of context.*set max_position_embeddings"):
        export_onnx(str(tmp_path / "source"), tmp_path / "output")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    config.seq_length = 64
    assert longest_text(config) == 64


def test_a_model_without_a_cache():
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedModelError, match="OpenAIGPTLMHeadModel cannot be exported: it takes no cache"):
        cache_shape(model)


def test_a_folder_that_holds_something(saved, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "mine").touch()
    with pytest.raises(ValueError, match="not empty"):
        export_onnx(str(saved("llama", 2)[1]), tmp_path / "output")
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["MODEL", "OUTPUT"], "--format"),
        (["MODEL", "OUTPUT", "--format", "gguf"], "'gguf' is not"),
        (["MODEL", "OUTPUT", "--format", "onnx", "--dtype", "int2"], "'int2' is not one of"),
        (["nowhere/at/all", "OUTPUT", "--format", "onnx"], "nowhere/at/all"),
        (["MODEL", "OUTPUT", "--format", "onnx", "--streams", "other"], "other"),
    ],
)
def test_the_command_line_says_so_in_one_line(arguments, complaint, saved, tmp_path, capsys):
    places = {"MODEL": str(saved("llama", 2)[1]), "OUTPUT": str(tmp_path / "output")}
    capsys.readouterr()  # the bar of the model that is saved for the first test that asks for it
    assert run(["export", *(places.get(argument, argument) for argument in arguments)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert complaint in printed
    assert not (tmp_path / "output").exists()


def test_a_model_that_torch_refuses_is_one_line(zoo, tmp_path, capfd):
    """Without the graph so far, which torch prints."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = zoo.FAMILIES["llama"].build("sdpa", num_hidden_layers=1, max_position_embeddings=16, rope_parameters=rope)
    model.save_pretrained(tmp_path / "source")
    capfd.readouterr()
    assert run(["export", str(tmp_path / "source"), str(tmp_path / "output"), "--format", "onnx"]) == 2
    printed = capfd.readouterr().err
    assert printed.count("\n") == 1
    assert "LlamaForCausalLM cannot be exported: torch.onnx.export makes no graph of it" in printed
    assert "data-dependent" in printed  # torch's own reason


def test_the_command_line_exports(saved, tmp_path, capsys):
    command = ["export", str(saved("llama", 2)[1]), str(tmp_path / "output"), "--format", "onnx"]
    assert run([*command, "--dtype", "int8", "--streams", "off", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_streams"], report["dtype"], report["format"]) == (1, "int8", "onnx")
    assert report["cache"] == {"layers": 1, "heads": 2, "head_size": 8}
    assert report["bytes"] == sum(path.stat().st_size for path in (tmp_path / "output").iterdir())
