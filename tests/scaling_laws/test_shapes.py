"""Parameters counted from a configuration against the models that transformers builds from it."""

import json

import pytest
import torch
from counted_models import window_layers
from transformers import AutoConfig, AutoModelForCausalLM

from parscale.scaling_laws import published, published_models, read_shape
from parscale.scaling_laws.shapes import ModelShape

# Exact to 1 in 1000 for these; what is left are biases of norms and norms of queries and keys.
EXACT = [
    "aria_text", "bloom", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "falcon", "gemma",
    "gemma2", "gemma3_text", "glm", "glm4", "gpt_neox", "granite", "llama", "mimo_v2_flash", "minimax_m2", "mistral",
    "mixtral", "mpt", "nanochat", "olmo", "olmo2", "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "smollm3", "stablelm", "starcoder2",
]  # fmt: skip


def few_layers(kind):
    """The family's own default sizes in at most four layers."""
    config = AutoConfig.for_model(kind)
    name = next(name for name in ("num_hidden_layers", "n_layer", "n_layers") if hasattr(config, name))
    setattr(config, name, 4)
    for kinds in ("layer_types", "mlp_layer_types"):
        if getattr(config, kinds, None):
            setattr(config, kinds, getattr(config, kinds)[:4])
    if kind == "phi":  # the default has one more matrix of layer norms than counted
        config.qk_layernorm = False
    if kind == "deepseek_v2":  # the default does not say
        config.num_experts_per_tok = 6
    return config


@pytest.mark.parametrize("kind", EXACT)
def test_parameters_are_those_of_the_model(kind):
    config = few_layers(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = read_shape(json.loads(json.dumps(config.to_dict(), default=str)))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert shape.backbone_params + shape.embedding_params == pytest.approx(total, rel=1e-3)
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert shape.tied == (output is embedding)
    if not shape.positions:
        apart = embedding.numel() + (0 if shape.tied else output.numel())
        assert shape.backbone_params == pytest.approx(total - apart, rel=1e-3)


def test_published_sizes_are_exact():
    points = published("stack")
    shapes = [read_shape(config) for config in published_models().values()]
    counted = [shape.params(streams) for streams in (1, 2, 4, 8) for shape in shapes]
    assert counted == points.params.tolist()


def test_streams_add_what_a_wrapped_model_has():
    """Counted by hand for a small shape: P = 3, T = 5, H = 8, 2 layers, 2 key/value heads of 4."""
    config = {
        "model_type": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 16,
        "vocab_size": 10,
        "parscale_n_tokens": 5,
    }
    shape = read_shape(config)
    assert shape.prefix_params(3) == 2 * 2 * 3 * 2 * 5 * 4
    assert shape.aggregator_params(3) == (24 * 8 + 8) + (8 * 3 + 3)
    assert shape.params(1) == shape.backbone_params


def test_windows_layers_and_nested_configurations_are_read():
    shape = read_shape(json.loads(AutoConfig.for_model("gemma3_text").to_json_string(use_diff=False)))
    assert 0 < window_layers(shape) < shape.attention_layers == shape.layers
    text = {"model_type": "qwen3_next", **json.loads(AutoConfig.for_model("qwen3_next").to_json_string(use_diff=False))}
    hybrid = read_shape(text)
    assert hybrid.attention_layers == hybrid.layers // 4
    outer = {"model_type": "llava", "text_config": published_models()["0.5B"], "tie_word_embeddings": False}
    assert read_shape(outer).hidden == 896
    unused = published_models()["0.5B"] | {"sliding_window": 512, "use_sliding_window": False}
    assert window_layers(read_shape(unused)) == 0


def without_kinds(kind, **sizes):
    """A family's default configuration, as transformers reads it, and a file of older code that names no layers."""
    config = AutoConfig.for_model(kind, **sizes)
    fields = json.loads(config.to_json_string(use_diff=False))
    return config, {name: value for name, value in fields.items() if name != "layer_types"}


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("gemma3_text", {"sliding_window_pattern": 3}),
        ("cohere2", {"sliding_window_pattern": 4}),
        ("cohere2", {}),
        ("mistral", {}),
        ("qwen3_next", {"full_attention_interval": 4}),
    ],
)
def test_kinds_of_layers_are_found_as_transformers_does(kind, field):
    _, fields = without_kinds(kind)
    fields |= field
    again = AutoConfig.for_model(kind, **{name: value for name, value in fields.items() if name != "model_type"})
    kinds = getattr(again, "layer_types", None) or ["sliding_attention"] * again.num_hidden_layers
    shape = read_shape(fields)
    assert shape.attention_layers == sum("linear" not in each for each in kinds)
    assert window_layers(shape) == sum("sliding" in each for each in kinds)


def test_a_pattern_of_letters_repeats():
    fields = published_models()["0.5B"] | {"num_hidden_layers": 10, "sliding_window": 512}
    assert window_layers(read_shape(fields | {"sliding_window_pattern": "LLLG"})) == 8


def test_layers_and_experts_of_jamba_are_found_by_their_periods():
    config, fields = without_kinds("jamba")
    kinds, experts = config.layers_block_type, config.layers_num_experts
    shape = read_shape(fields)
    assert shape.attention_layers == sum(kind == "attention" for kind in kinds) < shape.layers
    assert shape.sparse_layers == sum(count > 1 for count in experts) < shape.layers


def test_scaling_reaches_the_size_that_is_asked_for():
    shape = read_shape(published_models()["1.6B"])
    assert shape.scaled_to(3e9).backbone_params == pytest.approx(3e9, rel=1e-9)
    assert shape.scaled(1) == shape
    assert isinstance(shape, ModelShape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "has no hidden_size or n_embd or d_model"),
        ({"num_hidden_layers": "many"}, "has num_hidden_layers = 'many'; it must be a whole number"),
        ({"vocab_size": 0}, "has no vocab_size; the cost cannot be counted without it"),
        ({"num_key_value_heads": 3}, "has 16 heads and 3 key/value heads; the first must be a multiple of the second"),
        ({"layer_types": ["mamba"] * 36}, "no layer of 'qwen2' keeps keys and values"),
    ],
)
def test_impossible_configurations_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        read_shape(published_models()["1.6B"] | change)


def test_paths_and_folders_are_read_and_others_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published_models()["0.5B"]))
    assert read_shape(tmp_path) == read_shape(tmp_path / "config.json") == read_shape(published_models()["0.5B"])
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"list.json is not a configuration; give the path of a model's config.json"):
        read_shape(tmp_path / "list.json")
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist; give the path of a model's config.json"):
        read_shape(tmp_path / "none" / "config.json")
    assert read_shape((tmp_path / "config.json").read_text()) == read_shape(tmp_path)
    with pytest.raises(ValueError, match="this text is not a configuration"):
        read_shape('{"hidden_size": ')
    for wrong, kind in ((None, "NoneType"), ([], "list"), (8, "int")):
        with pytest.raises(ValueError, match=f"the path of a config.json or its contents, got {kind}"):
            read_shape(wrong)


def test_a_models_own_configuration_object_is_read():
    config = AutoConfig.for_model("qwen3", num_hidden_layers=3)
    assert read_shape(config) == read_shape(config.to_dict())
