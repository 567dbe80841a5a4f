"""Layers whose attention differs in its heads, keys and windows, against the models that transformers builds."""

import re

import pytest
import torch
import transformers
from cost_by_hand import FLOPS_ONLY, TINY
from counted_models import TOKENS, cached_bytes, counted_bytes, fields_of, tiny_models
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from parscale import wrap
from parscale.scaling_laws import cost, read_shape, training_memory

# What makes the sizes of each kind of layer different.
SIZES = {
    "DeepseekV32ForCausalLM": {},
    "Dots3NoteForCausalLM": {"swa_kv_lora_rank": 20, "swa_head_dim": 20, "swa_qk_nope_head_dim": 16},
    "Gemma3nForCausalLM": {},
    "Gemma4ForCausalLM": {"use_double_wide_mlp": True},
    "Gemma4UnifiedForCausalLM": {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "GlmMoeDsaForCausalLM": {"indexer_types": ["full", "shared"], "index_n_heads": 3},
    "HYV4ForCausalLM": {},
    "Inkling2ForCausalLM": {"swa_num_key_value_heads": 4, "swa_head_dim": 16},
    "InklingForCausalLM": {"swa_num_key_value_heads": 4, "swa_head_dim": 16},
    "LagunaForCausalLM": {"num_attention_heads_per_layer": [4, 8]},
    "LongcatFlashForCausalLM": {},
    "MiMoV2FlashForCausalLM": {"head_dim": 12},
}
WRAPPED = sorted(SIZES.keys() - {"Dots3NoteForCausalLM", "Inkling2ForCausalLM"})
# Without other products inside of attention.
PLAIN = sorted(SIZES.keys() - {"Inkling2ForCausalLM", "InklingForCausalLM"})
PROJECTION = re.compile(
    r"\.((q|k|v|o|q_a|q_b|kv_b)_proj(\.linear)?|kv_a_proj_with_mqa|(self_attn|o_proj)\.gate_proj|wq_b|wk|weights_proj)"
    r"\.weight$"
)
# Gemma 4 of 2 and of 31 billion parameters, with fewer layers.
GEMMA_4 = {
    "shared keys": {"hidden_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 1, "intermediate_size": 6144}
    | {"num_kv_shared_layers": 6, "use_double_wide_mlp": True},
    "keys as values": {"hidden_size": 5376, "num_attention_heads": 32, "num_key_value_heads": 16}
    | {"intermediate_size": 21504, "attention_k_eq_v": True, "num_global_key_value_heads": 4},
}


def build(name):
    if name not in tiny_models.names():
        pytest.skip(f"no {name} in this transformers")
    special = tiny_models.SPECIAL.get(name, {}) | SIZES[name]
    config = tiny_models.tiny_config(getattr(transformers, name).config_class, 6, special)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", SIZES)
def test_caches_and_projections_are_those_of_each_layer(name):
    model = build(name)
    fields = fields_of(model.config)
    shape = read_shape(fields)
    assert (counted_bytes(fields), shape.attention_layers) == cached_bytes(model)
    parameters = {key: value.numel() for key, value in model.named_parameters() if PROJECTION.search(key)}
    assert shape.attention_params == sum(parameters.values())


@pytest.mark.parametrize("name", WRAPPED)
def test_prefixes_are_those_of_each_layer(name):
    model = wrap(build(name), 3, prefix_length=5, init="random", seed=0)
    prefixes = sum(value.numel() for key, value in model.named_parameters() if "prefix_" in key)
    assert read_shape(fields_of(model.config)).prefix_params(3) == prefixes


@pytest.mark.parametrize("name", PLAIN)
def test_arithmetic_of_attention_is_that_of_each_layer(name):
    """The products of scores and of values in one step after a prompt, layers that borrow keys included.

    With latent attention also what makes keys and values of all latents, and an indexer's scores.
    """
    model = build(name)
    ids = torch.randint(3, tiny_models.FIRST_SPECIAL, (1, TOKENS + 1))
    with torch.no_grad():
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(ids[:, -1:], past_key_values=cache)
    counts = counter.get_flop_counts().items()
    products = sum(
        operations.get(torch.ops.aten.bmm, 0)
        for module, operations in counts
        if re.search(r"self_attn(\.\d)?$", module)
    )
    products += sum(sum(operations.values()) for module, operations in counts if module.endswith("kv_b_proj"))
    work = {"num_streams": 1, "batch_size": 1, "input_length": TOKENS, "hardware": FLOPS_ONLY}
    one, two = (cost(fields_of(model.config), output_length=n, **work).time["attention"] for n in (1, 2))
    assert products > 0
    assert two - one == pytest.approx(products)


@pytest.mark.parametrize("kind", GEMMA_4)
def test_parameters_of_gemma_4_are_those_of_the_model(kind):
    """To 1 in 1000, of norms of queries and keys; without inputs of single layers, which are counted in part."""
    config = AutoConfig.for_model("gemma4_text", num_hidden_layers=12, hidden_size_per_layer_input=0, **GEMMA_4[kind])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    shape = read_shape(fields_of(config))
    assert shape.backbone_params + shape.embedding_params == pytest.approx(total, rel=1e-3)
    assert shape.backbone_params == pytest.approx(total - model.get_input_embeddings().weight.numel(), rel=1e-3)


def test_published_files_are_read_as_transformers_reads_them():
    """They name the sizes of layers with a window, or of those without, where transformers writes each layer's."""
    for keys_are_values in (True, False):
        own = {"global_head_dim": 512, "num_global_key_value_heads": 2, "attention_k_eq_v": keys_are_values}
        written = fields_of(AutoConfig.for_model("gemma4_text", **own))
        published = {name: value for name, value in written.items() if name != "per_layer_config"} | own
        assert read_shape(published) == read_shape(written)
        full = [kind.kv_heads for kind in read_shape(written).attention if not kind.window]
        assert full == [2 if keys_are_values else 4]
    written = fields_of(AutoConfig.for_model("mimo_v2_flash", num_hidden_layers=6))
    lists = {"hybrid_layer_pattern": [0, 1, 1, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1, 1, 1]}
    published = {name: value for name, value in written.items() if not name.endswith("layer_types")} | lists
    swa = {"swa_num_attention_heads": 64, "swa_num_key_value_heads": 8, "swa_head_dim": 192, "swa_v_head_dim": 128}
    assert read_shape(published | swa) == read_shape(written)


def test_longcat_flash_has_its_published_sizes():
    """560 billion parameters, of which a token passes 27 billion on average (arXiv 2509.01322)."""
    config = AutoConfig.for_model("longcat_flash")
    shape = read_shape(fields_of(config))
    assert shape.backbone_params + shape.embedding_params == pytest.approx(560e9, rel=5e-3)
    passed = shape.sparse_layers * (shape.experts - shape.used_experts) * shape.expert_params
    assert shape.backbone_params + shape.embedding_params / 2 - passed == pytest.approx(27e9, rel=1e-2)
    (note,) = cost(shape, num_streams=1, batch_size=1, input_length=8, output_length=8).notes
    assert note.startswith("of the 12 experts that a token passes, 8 have parameters")


def test_longcat_flash_has_the_parameters_of_the_model():
    """But for the rows that transformers makes for zero experts and never reads."""
    config = AutoConfig.for_model("longcat_flash", num_layers=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    unread = sum(
        value[config.n_routed_experts :].numel()
        for key, value in model.named_parameters()
        if key.endswith("experts.gate_up_proj")
    )
    shape = read_shape(fields_of(config))
    assert shape.backbone_params + shape.embedding_params == pytest.approx(total - unread, rel=1e-5)
    older = fields_of(config) | {"num_hidden_layers": 4}  # as transformers 4 wrote beside num_layers
    assert read_shape(older) == shape


def test_zero_experts_do_no_work():
    """Of the two experts of a token, one has matrices; the router chooses among sixteen."""
    sparse = {"num_experts": 8, "zero_expert_num": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    work = {"num_streams": 1, "batch_size": 1, "input_length": 1, "output_length": 1, "hardware": FLOPS_ONLY}
    assert cost(TINY | sparse, **work).time["mlp"] == pytest.approx(2 * 3 * (3 * 8 * 16 + 8 * 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compress_rates": {"compressed_sparse_attention": 4}}, r"'llama' is .* several tokens .*\(compress_rates is"),
        (
            {"compress_ratios": [0, 4, 128]},
            r"several tokens at once \(compress_ratios is \[0, 4, 128\]\); give a model",
        ),
        ({"index_n_heads": 4}, r"indexers unlike that of DeepSeek-V3.2 \(index_n_heads is 4\); give a model without"),
        ({"word_embed_proj_dim": 4}, r"embeddings of another size than the layers' 8 \(word_embed_proj_dim is 4\)"),
        ({"is_encoder_decoder": True}, r"'llama' is not counted.*an encoder returns \(is_encoder_decoder is True\)"),
        ({"model_type": "nemotron_h"}, "'nemotron_h' is not counted, since it has layers that hold attention, a state"),
        ({"model_type": "cpmant"}, "'cpmant' is not counted, since it has tokens of its own before every text"),
        ({"layer_types": ["minimax_m3_sparse"] * 3}, "names layers of the kind 'minimax_m3_sparse', whose cost is not"),
        (
            {"model_type": "gpt_oss", "sliding_window": 4},
            "'gpt_oss' has no layer_types, .*; give the file that transformers saves",
        ),
        (
            {"model_type": "hy_v4", "index_n_heads": 2, "indexer_types": ["full"]},
            r"indexer_types is \['full'\]; it must name one for each of the 3 layers",
        ),
        ({"per_layer_config": {"1": {"skip": ["attention"]}}}, "per_layer_config has 'skip' for layer 1"),
        ({"per_layer_config": {"1": {"head_dim": -2}}}, "per_layer_config has head_dim = -2 for layer 1"),
        ({"per_layer_config": [4, 8, 4]}, r"per_layer_config is \[4, 8, 4\]; it must give fields to layers"),
        ({"per_layer_config": {"all": {}}}, "per_layer_config is {'all': {}}; it must give fields to layers"),
        ({"num_experts": 4, "num_experts_per_tok": 1, "mlp_layer_types": ["sparse"]}, "3 layers and 1 mlp_layer_types"),
    ],
)
def test_layers_that_are_not_counted_are_refused_by_their_field(change, message):
    with pytest.raises(ValueError, match=message):
        read_shape(TINY | change)


def test_deepseek_v4_is_refused():
    with pytest.raises(ValueError, match="the cost of 'deepseek_v4' is not counted, since it has keys of several"):
        read_shape(AutoConfig.for_model("deepseek_v4"))


def test_counts_for_equal_layers_refuse_others():
    wider = TINY | {"per_layer_config": {"1": {"num_key_value_heads": 4}}}
    assert read_shape(wider).attention_params == read_shape(TINY).attention_params + 2 * 8 * 4
    work = {"num_streams": 1, "batch_size": 1, "input_length": 8, "output_length": 8}
    with pytest.raises(ValueError, match="the paper's count is for dense models"):
        cost(wider, **work, method="paper")
    with pytest.raises(ValueError, match="the same grouped-query attention in each"):
        training_memory(wider, num_streams=2, batch_size=1, sequence_length=8)
