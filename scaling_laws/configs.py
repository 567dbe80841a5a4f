"""Reads a model's shape from its `config.json`, under any architecture's field names.

Tested against transformers' own models: for each family of causal and multimodal language models whose default
configuration builds one that runs, parameters, the cache of a token, states and the arithmetic of a step are those of
the model to 5 %, and parameters exact for the families of Llama, Mistral, Mixtral, Qwen2 and 3 and their sparse
versions, Gemma, OLMo, Cohere, GLM, Granite, Phi, DeepSeek, MiMo, LongCat-Flash, GPT-2, OPT, NeoX and others. Heads,
ranks and windows may differ by layer. What is not counted is refused by name (`uncounted.py`). A family that
transformers does not know is counted by its fields, as a decoder with a gated MLP.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parscale.scaling_laws.fields import NAMES, Reader, brief, listed_layers, require_one_each
from parscale.scaling_laws.files import read_text
from parscale.scaling_laws.layers import attention_of_layers, layer_kinds
from parscale.scaling_laws.shapes import PREFIX_LENGTH, ModelShape
from parscale.scaling_laws.uncounted import require_counted

MOST_LAYERS = 100_000

Config = str | Path | Mapping[str, Any] | ModelShape

# Encoders that can be decoders: their MLP has one matrix up and one down, and every projection a bias.
BERTS = {
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "git", "megatron-bert",
    "rembert", "roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl",
}  # fmt: skip
# Families whose MLP has one matrix up and one down; all others have a gate, with two up and one down.
UNGATED = BERTS | {
    "apertus", "apertus1p5_text", "arcee", "biogpt", "bloom", "codegen", "cosmos3_edge_text", "ctrl", "falcon",
    "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gptj", "jais2", "mpt", "nanochat",
    "nemotron", "opt", "persimmon", "phi", "starcoder2", "xglm",
}  # fmt: skip
# Families that tie the output matrix to the embedding unless the configuration says otherwise.
TIED = BERTS - {"git"} | {
    "biogpt", "bloom", "cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "ctrl", "ernie4_5", "ernie4_5_moe",
    "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "gpt2",
    "gpt_bigcode", "gpt_neo", "gpt_neox_japanese", "granite_swa", "lara_mini", "lfm2", "lfm2_moe", "lfm3",
    "minicpm3", "modernbert-decoder", "mpt", "opt", "recurrent_gemma", "smollm3", "starcoder2", "vaultgemma", "xglm",
    "youtu", "zaya",
}  # fmt: skip
# Families whose projections all have biases, and those where only queries, keys and values do.
ALL_BIASED = BERTS | {"biogpt", "bloom", "ctrl", "gpt2", "gpt_bigcode", "gpt_neox", "opt", "phi", "starcoder2", "xglm"}
QKV_BIASED = {"qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl"}
LEARNED_POSITIONS = BERTS - {"roformer"} | {"gpt2", "gpt_bigcode", "gpt_neo", "opt"}
# Families with one shared expert of the size in `intermediate_size`.
SHARED_AS_DENSE = {"hunyuan_v1_moe", "llama4_text"}
# Families that multiply a token with every expert, and what most of them return with 0.
EVERY_EXPERT = {"llama4_text"}
# Families whose MLP has half of `intermediate_size`.
HALF_INNER = {"recurrent_gemma"}
# Families whose decoder layer holds two layers of attention and an MLP, one of them with a mixture beside its MLP.
TWO_IN_ONE = {"longcat_flash"}

# The language part of a multimodal configuration, and fields that it may have outside of this part.
LANGUAGE = ("thinker_config", "text_config", "llm_config", "language_config")
OF_THE_WHOLE = ("tie_word_embeddings", "parscale_n_tokens", "parscale_transform")


def read_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a `config.json`: from its path, from its folder's path, or given directly, as text or a mapping.

    A configuration object of transformers, which has a `to_dict`, is read as its contents. Raises `FileNotFoundError`
    if the path does not exist, and `ValueError` for a file without a JSON object and for an argument of another type.
    """
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    if isinstance(config, Mapping):
        return dict(config)
    if not isinstance(config, str | os.PathLike):
        raise ValueError(f"a configuration is the path of a config.json or its contents, got {type(config).__name__}")
    wanted = "the path of a model's config.json, or of its folder"
    if isinstance(config, str) and config.lstrip().startswith("{"):
        named, text = "this text", config
    else:
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        named, text = str(path), read_text(path, wanted)
    try:
        contents = json.loads(text)
    except (ValueError, RecursionError):
        contents = None
    if not isinstance(contents, dict):
        raise ValueError(f"{named} is not a configuration; give {wanted}")
    return contents


def read_shape(config: Config) -> ModelShape:
    """The shape in a `config.json` of any architecture with attention.

    Args:
        config: its path, its folder's path, or its contents; a `ModelShape` is returned as it is.

    Returns:
        The shape.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: it is not a configuration, a required size is missing or impossible, it has parts whose cost is not
            counted, or streams that differ by something other than prefixes.
    """
    if isinstance(config, ModelShape):
        return config
    contents = read_config(config)
    _require_finite(contents)
    outer, others = contents, _other_parts(contents)
    for key in LANGUAGE:
        if isinstance(contents.get(key), dict):
            others += _other_parts(contents[key])
            own = {field: value for field, value in contents[key].items() if value is not None}
            whole = {field: value for field in OF_THE_WHOLE if (value := outer.get(field)) is not None}
            contents = whole | own | {field: value for field, value in whole.items() if value}
    for key in ("attn_config", "ffn_config"):  # DBRX
        if isinstance(contents.get(key), dict):
            contents = contents[key] | contents
    name = str(contents.get("model_type") or outer.get("model_type") or "").removesuffix("_parscale")
    if (transform := contents.get("parscale_transform") or "prefix") != "prefix":
        raise ValueError(
            f"the streams of this {name!r} have the transform {brief(transform)}, and costs are counted for 'prefix' "
            "alone; give the backbone's config.json"
        )
    if name in TWO_IN_ONE:
        doubled = contents.get("num_hidden_layers") or 2 * Reader(contents, name).optional("num_layers")
        contents = contents | {"num_hidden_layers": doubled, "decoder_sparse_step": 2, "enable_moe_block": True}
    number = Reader(contents, name)
    require_counted(contents, name, number.optional(*NAMES["hidden"]))
    hidden, layers = number.needed("hidden"), number.needed("layers")
    if layers > MOST_LAYERS:
        raise ValueError(f"the configuration of {name!r} has {layers:,} layers; give one of at most {MOST_LAYERS:,}")
    vocab = number.needed("vocab_size")
    borrowers = min(layers, number.optional("num_kv_shared_layers"))
    attention = attention_of_layers(contents, name, layer_kinds(contents, name, layers), borrowers)
    wider = 1 + borrowers / layers if contents.get("use_double_wide_mlp") else 1
    if not any(kind.keys == "own" for kind in attention):
        raise ValueError(
            f"no layer of {name!r} keeps keys and values, and the streams' prefixes are keys and values; give a "
            "model with attention"
        )
    tied = contents.get("tie_word_embeddings")
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        attention=attention,
        intermediate=wider * _intermediate(number, hidden),
        vocab=vocab,
        gated=name not in UNGATED,
        tied=name in TIED if tied is None else bool(tied),
        **_experts(number, contents, layers),
        biases=_biases(contents, name),
        norms_per_layer=_norms_per_layer(name),
        positions=number.optional("max_position_embeddings", "n_positions") if name in LEARNED_POSITIONS else 0,
        layer_embeddings=layers
        * number.optional("vocab_size_per_layer_input")
        * number.optional("hidden_size_per_layer_input"),
        other_parts=tuple(dict.fromkeys(others)),
        prefix_length=number.optional("parscale_n_tokens") or PREFIX_LENGTH,
    )


def _biases(contents: Mapping[str, Any], name: str) -> str:
    """Which projections have biases, as `ModelShape.biases` says it."""
    if name in ALL_BIASED:
        return "all"
    return "qkv" if name in QKV_BIASED or contents.get("attention_bias") else "none"


def _norms_per_layer(name: str) -> int:
    has_four = name.startswith(("gemma2", "gemma3", "gemma4", "glm4", "olmo2")) and name != "glm4_moe"
    return 4 if has_four else 2


def _other_parts(contents: Mapping[str, Any]) -> list[str]:
    """The fields that describe parts beside the language model."""
    nested = [field for field, part in contents.items() if isinstance(part, dict) and "model_type" in part]
    return [field for field in nested if field.endswith("_config") and field not in LANGUAGE]


def _intermediate(number: Reader, hidden: int) -> int:
    """The inner size of a dense MLP."""
    inner = number.optional("intermediate_size_mlp", *NAMES["intermediate"]) or 4 * hidden
    if number.model in HALF_INNER:
        return inner // 2
    if not number.contents.get("block_auto_adjust_ff_dim"):
        return inner
    inner, multiple = 2 * inner // 3, number.optional("block_multiple_of") or 1  # LFM2
    return -(-int(inner * (number.contents.get("block_ffn_dim_multiplier") or 1)) // multiple) * multiple


def _experts(number: Reader, contents: Mapping[str, Any], layers: int) -> dict[str, Any]:
    experts = number.optional(*NAMES["experts"])
    if experts < 2 or contents.get("enable_moe_block") is False:
        return {}
    active, zero = number.needed("active"), number.optional("zero_expert_num")
    active = experts if number.model in EVERY_EXPERT else active
    if active > experts + zero:
        raise ValueError(f"each token passes {active} experts of {experts + zero}; it must be at most all of them")
    dense_inner = number.optional(*NAMES["intermediate"])
    inner = number.optional("moe_intermediate_size", "expert_ffn_hidden_size", "expert_dim") or dense_inner
    shared = number.optional("shared_expert_intermediate_size", "share_expert_dim") or inner * number.optional(
        "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"
    )
    if contents.get("enable_moe_block") or number.model in SHARED_AS_DENSE:
        shared = dense_inner
    dense = listed_layers(contents, "mlp_only_layers")
    first = number.optional("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers")
    if step := number.optional("expert_layer_period"):
        place = number.optional("expert_layer_offset")
    else:
        step = number.optional("decoder_sparse_step", "interleave_moe_layer_step") or 1
        place = step - 1
    sparse = [i for i in range(layers) if i >= first and i not in dense and i % step == place]
    if isinstance(contents.get("moe_layers"), list):
        sparse = sorted(listed_layers(contents, "moe_layers") & set(range(layers)))
    for field in ("mlp_layer_types", "moe_layer_freq"):
        if isinstance(kinds := contents.get(field), list):
            require_one_each(kinds, layers, field)
            sparse = [i for i, kind in enumerate(kinds) if kind not in ("dense", 0)]
    return {
        "experts": experts,
        "zero_experts": zero,
        "active_experts": active,
        "expert_intermediate": inner,
        "shared_intermediate": shared,
        "sparse_layers": len(sparse),
    }


def _require_finite(contents: object) -> None:
    """Raises `ValueError` for NaN, and for infinity unless it is an open limit, such as that of time steps."""
    waiting = [("", contents)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.items()
        elif isinstance(value, list | tuple):
            waiting += [(name, item) for item in value]
        elif isinstance(value, float) and not (math.isfinite(value) or (value > 0 and str(name).endswith("_limit"))):
            raise ValueError(f"the configuration has {name} = {value}; it must be a finite number")
