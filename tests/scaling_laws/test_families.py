"""What a configuration says of layers, caches, experts and ties, against the small model that transformers builds."""

import pytest
import torch
import transformers
from counted_models import cached_bytes, counted_bytes, fields_of, tiny_models, window_layers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from parscale import wrap
from parscale.scaling_laws import cost, read_shape
from parscale.scaling_laws.layers import LISTED, LISTED_WINDOWS

CACHES = [
    "BambaForCausalLM", "DeepseekV3ForCausalLM", "Gemma3nForCausalLM", "JambaForCausalLM", "Lfm2ForCausalLM",
    "Llama4ForCausalLM", "MiniCPM3ForCausalLM", "MllamaForCausalLM", "BailingHybridForCausalLM", "InklingForCausalLM",
    "Qwen3NextForCausalLM",
]  # fmt: skip
# With the fields that make it a mixture, where its default is none.
MIXTURES = {
    "AriaTextForCausalLM": {},
    "DbrxForCausalLM": {
        "attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2},
    },
    "Ernie4_5_MoeForCausalLM": {},
    "HunYuanMoEV1ForCausalLM": {"num_experts": 4, "moe_topk": 2},
    "KimiLinearForCausalLM": {},
    "LongcatFlashForCausalLM": tiny_models.SPECIAL["LongcatFlashForCausalLM"],
    "MixtralForCausalLM": {},
}


def build(name):
    if name not in tiny_models.names():
        pytest.skip(f"no {name} in this transformers")
    return tiny_models.Tiny(name).build()


@pytest.mark.parametrize("name", CACHES)
def test_the_cache_is_that_of_the_model(name):
    model = build(name)
    fields = fields_of(model.config)
    assert (counted_bytes(fields), read_shape(fields).attention_layers) == cached_bytes(model)


def test_layers_that_a_file_does_not_list_are_those_of_the_model_or_refused():
    seen = 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            fields = fields_of(CONFIG_MAPPING[kind]())
            listed = read_shape(fields)
        except (ValueError, StrictDataclassError):  # it has no default, or is not counted
            continue
        if fields.pop("layer_types", None) is None:
            continue
        seen += 1
        if kind in LISTED | LISTED_WINDOWS:
            with pytest.raises(ValueError, match="has no layer_types"):
                read_shape(fields)
        else:
            assert read_shape(fields).attention == listed.attention, kind
    assert seen > 30


@pytest.mark.parametrize("kind", ["llama4_text", "recurrent_gemma", "bamba"])
def test_layers_are_found_where_a_file_does_not_list_them(kind):
    config = AutoConfig.for_model(kind, **({"attn_layer_indices": [3, 5]} if kind == "bamba" else {}))
    fields = {name: value for name, value in fields_of(config).items() if name not in ("layer_types", "no_rope_layers")}
    shape = read_shape(fields)
    assert shape.attention_layers == sum("linear" not in each for each in config.layer_types)
    assert window_layers(shape) == sum("sliding" in each or "chunked" in each for each in config.layer_types)
    windows = {"llama4_text": 8192, "recurrent_gemma": 2048, "bamba": 0}
    assert max(each.window for each in shape.attention) == windows[kind]


@pytest.mark.parametrize("kind", ["mamba2", "xlstm"])
def test_a_model_without_attention_is_refused(kind):
    with pytest.raises(ValueError, match=f"no layer of '{kind}' keeps keys and values"):
        read_shape(AutoConfig.for_model(kind))


@pytest.mark.parametrize("name", ["Gemma3nForCausalLM", "BambaForCausalLM", "DeepseekV3ForCausalLM"])
def test_prefixes_are_those_of_the_layers_that_keep_keys(name):
    model = wrap(build(name), 3, prefix_length=5, init="random", seed=0)
    prefixes = sum(parameter.numel() for name, parameter in model.named_parameters() if "prefix_" in name)
    assert read_shape(fields_of(model.config)).prefix_params(3) == prefixes


def test_a_language_model_that_sees_has_its_own_prefix_length():
    model = wrap(build("Gemma3ForConditionalGeneration"), 2, prefix_length=5, init="random", seed=0)
    assert read_shape(fields_of(model.config)).prefix_length == 5


def test_parts_beside_the_language_model_are_named():
    (note,) = cost(AutoConfig.for_model("gemma3"), num_streams=1, batch_size=1, input_length=8, output_length=8).notes
    assert note == "counted is the language model alone, without what vision_config describes."


@pytest.mark.parametrize(("whole", "text", "tied"), [(True, False, True), (False, True, True), (False, False, False)])
def test_a_multimodal_model_is_tied_if_either_part_says_so(whole, text, tied):
    """As transformers reads the files of families that have said so in the language part."""
    config = AutoConfig.for_model("llava", tie_word_embeddings=whole, text_config={"tie_word_embeddings": text})
    fields = fields_of(config) | {"tie_word_embeddings": whole}
    assert read_shape(fields).tied == tied == config.tie_word_embeddings


EXPERTS_BESIDE_THE_MLP = {"enable_moe_block": True, "num_experts": 16, "top_k_experts": 3, "moe_intermediate_size": 704}


@pytest.mark.parametrize(("kind", "experts"), [("gemma3n_text", {}), ("gemma4_text", EXPERTS_BESIDE_THE_MLP)])
def test_embeddings_of_layers_are_counted(kind, experts):
    """To two hundredths: they are a third of either, and their other additional parts are small."""
    config = AutoConfig.for_model(kind, **experts)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    shape = read_shape(fields_of(config))
    assert shape.backbone_params + shape.embedding_params == pytest.approx(total, rel=2e-2)
    assert shape.active_experts == experts.get("top_k_experts", 0)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_token_passes_as_many_experts_as_in_the_model(name):
    if name not in tiny_models.names():
        pytest.skip(f"no {name} in this transformers")
    cls = getattr(transformers, name)
    config = tiny_models.tiny_config(cls.config_class, 6, MIXTURES[name])
    routers = {getattr(module, "top_k", None) for module in cls(config).modules()} - {None}
    shape = read_shape(fields_of(config))
    assert shape.sparse_layers > 0
    assert {shape.active_experts} == routers == {2}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("afmoe", {}),
        ("beam", {}),
        ("glm4_moe_lite", {}),
        ("llama4_text", {}),
        ("llama4_text", {"interleave_moe_layer_step": 2}),
        ("mimo_v2_flash", {}),
    ],
)
def test_dense_layers_of_mixtures_are_those_of_the_model(kind, changes):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"no {kind} in this transformers")
    config = AutoConfig.for_model(kind, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = [name for name, _ in model.named_modules()]
    shape = read_shape(fields_of(config))
    assert shape.sparse_layers == sum(name.endswith(".experts") for name in names)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert shape.backbone_params + shape.embedding_params == pytest.approx(total, rel=1e-2)


@pytest.mark.parametrize(
    "kinds", [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, pytest.param(CONFIG_MAPPING, marks=pytest.mark.nightly)], ids=len
)
def test_every_mixture_says_how_many_experts_a_token_passes(kinds):
    """A field of another name is refused: nothing is assumed. These are encoders with decoders, or say none."""
    silent = {"nllb-moe", "switch_transformers", "deepseek_v2", "deepseek_ocr2", "deepseek_ocr2_text"}
    without = set()
    for kind in kinds:
        try:
            read_shape(fields_of(CONFIG_MAPPING[kind]()))
        except (ValueError, StrictDataclassError) as error:  # or it has no default, or no attention
            if "num_experts_per_tok" in str(error):
                without.add(kind.removesuffix("_parscale"))
    assert without <= silent


def test_a_file_that_does_not_say_whether_it_is_tied_is_its_familys():
    """transformers 4 left the field out where it is true by default."""
    wrong, seen = [], 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[kind]()
            fields = fields_of(config)
            said = read_shape(fields).tied
        except (ValueError, StrictDataclassError):  # it has no default, or no attention
            continue
        parts = [value for value in fields.values() if isinstance(value, dict) and "model_type" in value]
        if parts or fields.pop("tie_word_embeddings", None) is None:  # not of a language model alone, or no such field
            continue
        seen += 1
        if not read_shape(fields).tied == said == config.tie_word_embeddings:
            wrong.append(kind)
    assert not wrong
    assert seen > 100
