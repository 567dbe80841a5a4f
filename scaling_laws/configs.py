"""Reads a model's shape from its `config.json`, under any architecture's field names.

Tested against transformers' own models: exact for the families of Llama, Mistral, Mixtral, Qwen2 and 3 and their sparse
versions, Gemma, OLMo, Cohere, GLM, Granite, Phi, DeepSeek, GPT-2, OPT, NeoX and others; within some percent for
families with additional parts; an estimate for those with layers other than attention, which `cost` reports in its
notes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parscale.scaling_laws.files import read_json, require_file
from parscale.scaling_laws.shapes import PREFIX_LENGTH, ModelShape

MOST_LAYERS = 100_000
LARGEST = 10**12
"""The upper limit of every number in a model's shape."""

# Families whose MLP has one matrix up and one down; all others have a gate, with two up and one down.
UNGATED = {
    "apertus", "arcee", "bart", "biogpt", "bloom", "codegen", "cpmant", "ctrl", "falcon", "gpt-sw3", "gpt2",
    "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gptj", "jais2", "mpt", "nanochat", "nemotron",
    "openai-gpt", "opt", "persimmon", "phi", "starcoder2", "xglm",
}  # fmt: skip
# Families that tie the output matrix to the embedding unless the configuration says otherwise.
TIED = {
    "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot", "blenderbot-small",
    "bloom", "camembert", "cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "cpmant", "ctrl", "data2vec-text",
    "electra", "ernie", "ernie4_5", "ernie4_5_moe", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text",
    "gemma3n_text", "gemma4_text", "gemma4_unified_text", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox_japanese",
    "granite_swa", "jetmoe", "lfm2", "lfm2_moe", "lfm3", "marian", "mbart", "megatron-bert", "minicpm3",
    "modernbert-decoder", "mpt", "mvp", "openai-gpt", "opt", "pegasus", "plbart", "recurrent_gemma", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "smollm3", "starcoder2", "trocr", "vaultgemma", "whisper", "xglm",
    "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod", "youtu", "zamba", "zamba2", "zaya",
}  # fmt: skip
# Families whose projections all have biases, and those where only queries, keys and values do.
ALL_BIASED = {"bart", "biogpt", "bloom", "gpt2", "gpt_bigcode", "gpt_neox", "opt", "phi", "starcoder2", "xglm"}
QKV_BIASED = {"qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl"}
# Every how manieth layer attends to everything where the configuration does not say; the others have a window.
FULL_ATTENTION_STEP = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "llama4_text": 4}
# Families with heads, but none of attention.
WITHOUT_ATTENTION = {"mamba2", "xlstm"}
LEARNED_POSITIONS = {"gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt"}

# Fields that a multimodal configuration may have outside of its language part.
OF_THE_WHOLE = ("tie_word_embeddings", "parscale_n_tokens", "parscale_transform")

NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads"),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "active": (
        "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts",
        "num_selected_experts",
    ),
    "window": ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size"),
}  # fmt: skip
# Fields that list what each layer is; one of letters has a star for attention.
KINDS = ("layer_types", "layers_block_type", "hybrid_override_pattern")


def read_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a `config.json`: from its path, from its folder's path, or given directly.

    A configuration object of transformers, which has a `to_dict`, is read as its contents. Raises `FileNotFoundError`
    if the path does not exist, and `ValueError` for a file without a JSON object and for an argument of another type.
    """
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    if isinstance(config, Mapping):
        return dict(config)
    if not isinstance(config, str | os.PathLike):
        raise ValueError(f"a configuration is the path of a config.json or its contents, got {type(config).__name__}")
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    wanted = "the path of a model's config.json, or of its folder"
    require_file(path, wanted)
    try:
        contents = read_json(path, wanted)
    except ValueError:
        contents = None
    if not isinstance(contents, dict):
        raise ValueError(f"{path} is not a configuration; give {wanted}")
    return contents


def read_shape(config: str | Path | Mapping[str, Any]) -> ModelShape:
    """The shape in a `config.json` of any architecture with attention.

    Args:
        config: its path, its folder's path, or its contents.

    Returns:
        The shape.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: it is not a configuration, a required size is missing or impossible, or it has streams that differ
            by something other than prefixes.
    """
    contents = read_config(config)
    _require_finite(contents)
    outer = contents
    for key in ("text_config", "llm_config", "language_config", "thinker_config"):  # multimodal: the language part
        if isinstance(contents.get(key), dict):
            contents = {field: outer.get(field) for field in OF_THE_WHOLE} | contents[key]
    for key in ("attn_config", "ffn_config"):  # DBRX
        if isinstance(contents.get(key), dict):
            contents = contents[key] | contents
    name = str(contents.get("model_type") or outer.get("model_type") or "").removesuffix("_parscale")
    if (transform := contents.get("parscale_transform") or "prefix") != "prefix":
        raise ValueError(
            f"the streams of this {name!r} have the transform {_brief(transform)}, and costs are counted for 'prefix' "
            "alone; give the backbone's config.json"
        )
    number = _Reader(contents, name)
    hidden, layers, heads = (number.needed(key) for key in ("hidden", "layers", "heads"))
    if layers > MOST_LAYERS:
        raise ValueError(f"the configuration of {name!r} has {layers:,} layers; give one of at most {MOST_LAYERS:,}")
    vocab = number.needed("vocab_size")
    head_dim = number.optional("head_dim", "attention_head_dim", "kv_channels") or hidden / heads
    kv_heads = _kv_heads(number, name, heads)
    latent = number.optional("kv_lora_rank")
    rope = number.optional("qk_rope_head_dim") if latent else 0
    if latent:
        head_dim, kv_heads = number.optional("qk_nope_head_dim") + rope, heads
    kinds = _layer_kinds(contents, name, layers)
    kinds = kinds[: max(0, layers - number.optional("num_kv_shared_layers"))]  # the others read the keys of these
    window = number.optional(*NAMES["window"]) if contents.get("use_sliding_window", True) else 0
    attention = sum(("attention" in kind or "hybrid" in kind) and "linear" not in kind for kind in kinds)
    if not attention:
        raise ValueError(
            f"no layer of {name!r} keeps keys and values, and the streams' prefixes are keys and values; give a "
            "model with attention"
        )
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=(number.optional("v_head_dim") if latent else 0) or head_dim,
        intermediate=number.optional(*NAMES["intermediate"]) or 4 * hidden,
        vocab=vocab,
        gated=name not in UNGATED,
        tied=_flag(contents, "tie_word_embeddings", name in TIED),
        attention_layers=attention,
        query_rank=number.optional("q_lora_rank") if latent else 0,
        kv_rank=latent,
        rope_dim=rope,
        window=window,
        window_layers=sum("sliding" in kind or "chunked" in kind for kind in kinds) if window else 0,
        **_experts(number, contents, layers),
        biases="all"
        if name in ALL_BIASED
        else "qkv"
        if name in QKV_BIASED or contents.get("attention_bias")
        else "none",
        norms_per_layer=4 if name.startswith(("gemma2", "gemma3", "glm4", "olmo2")) and name != "glm4_moe" else 2,
        positions=number.optional("max_position_embeddings", "n_positions") if name in LEARNED_POSITIONS else 0,
        layer_embeddings=layers
        * number.optional("vocab_size_per_layer_input")
        * number.optional("hidden_size_per_layer_input"),
        prefix_length=number.optional("parscale_n_tokens") or PREFIX_LENGTH,
    )


@dataclass(frozen=True)
class _Reader:
    """Whole numbers of a configuration, each under one of several names."""

    contents: Mapping[str, Any]
    model: str

    def optional(self, *names: str) -> int:
        """The first of `names` that is present; 0 if none is."""
        for name in names:
            value = self.contents.get(name)
            if isinstance(value, list) and value and all(_is_size(item) for item in value):
                value = round(sum(value) / len(value))  # one for each layer: use their mean
            if value is None or isinstance(value, bool):
                continue
            if not _is_size(value):
                raise ValueError(
                    f"the configuration of {self.model!r} has {name} = {_brief(value)}; it must be a whole number of "
                    f"at least 0 and at most {LARGEST:,}"
                )
            return int(value)
        return 0

    def needed(self, key: str) -> int:
        """Like `optional`, but raises `ValueError` if the number is missing or 0."""
        names = NAMES.get(key, (key,))
        value = self.optional(*names)
        if not value:
            raise ValueError(
                f"the configuration of {self.model!r} has no {' or '.join(names)}; the cost cannot be counted "
                "without it"
            )
        return value


def _kv_heads(number: _Reader, name: str, heads: int) -> int:
    multi_query = number.contents.get("multi_query") and not number.contents.get("new_decoder_architecture")
    if multi_query and name in ("falcon", "gpt_bigcode"):
        return 1
    kv_heads = (
        number.optional("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads", "multi_query_group_num")
        or heads
    )
    if heads % kv_heads and not isinstance(number.contents.get("num_key_value_heads"), list):
        raise ValueError(
            f"the configuration of {name!r} has {heads} heads and {kv_heads} key/value heads; the first must be a "
            "multiple of the second"
        )
    return kv_heads


def _layer_kinds(contents: Mapping[str, Any], name: str, layers: int) -> list[str]:
    """What each layer is, in the words of `layer_types`; some families, and files of older code, have other fields."""
    full, number = "full_attention", _Reader(contents, name)
    for field in KINDS:
        kinds = contents.get(field)
        if isinstance(kinds, list | str) and kinds:
            if len(kinds) != layers:
                raise ValueError(
                    f"the configuration has {layers} layers and {len(kinds)} {field}; it must name one for each"
                )
            return [full if kind == "*" else str(kind) for kind in kinds]
    if name in WITHOUT_ATTENTION:
        return ["mamba"] * layers
    if "attn_layer_indices" in contents:
        listed = _listed(contents, "attn_layer_indices")
        return [full if i in listed else "mamba" for i in range(layers)]
    if listed := _listed(contents, "cross_attention_layers"):  # whose keys are those of images
        return ["cross" if i in listed else full for i in range(layers)]
    if isinstance(blocks := contents.get("block_types"), list) and blocks:  # repeated; all attention has a window
        return [str(blocks[i % len(blocks)]).replace("attention", "sliding_attention") for i in range(layers)]

    def one_in(step: int, place: int, others: str) -> list[str]:
        return [full if i % step == place else others for i in range(layers)]

    if step := number.optional("full_attention_interval"):
        return one_in(step, step - 1, "linear_attention")
    if step := number.optional("attn_layer_period"):
        return one_in(step, number.optional("attn_layer_offset"), "mamba")
    if number.optional(*NAMES["window"]) and contents.get("use_sliding_window", True):
        pattern = contents.get("sliding_window_pattern", FULL_ATTENTION_STEP.get(name))
        if isinstance(pattern, str) and pattern:  # a letter for each layer, G for those that attend to everything
            return [full if pattern[i % len(pattern)] == "G" else "sliding_attention" for i in range(layers)]
        step = pattern if _is_size(pattern) and pattern else layers + 1
        return one_in(step, step - 1, "sliding_attention")
    return [full] * layers


def _experts(number: _Reader, contents: Mapping[str, Any], layers: int) -> dict[str, Any]:
    experts = number.optional(*NAMES["experts"])
    if experts < 2 or contents.get("is_moe") is False or contents.get("enable_moe_block") is False:
        return {}
    active = number.needed("active")
    if active > experts:
        raise ValueError(f"each token passes {active} experts of {experts}; it must be at most all of them")
    dense_inner = number.optional(*NAMES["intermediate"])
    inner = number.optional("moe_intermediate_size", "expert_ffn_hidden_size", "expert_dim") or dense_inner
    shared = number.optional("shared_expert_intermediate_size") or inner * number.optional(
        "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"
    )
    if contents.get("enable_moe_block"):  # beside the dense MLP
        shared = dense_inner
    dense = _listed(contents, "mlp_only_layers")
    first = number.optional("first_k_dense_replace", "moe_layer_start_index")
    if step := number.optional("expert_layer_period"):
        place = number.optional("expert_layer_offset")
    else:
        step = number.optional("decoder_sparse_step", "interleave_moe_layer_step") or 1
        place = step - 1
    sparse = [i for i in range(layers) if i >= first and i not in dense and i % step == place]
    return {
        "experts": experts,
        "active_experts": active,
        "expert_intermediate": inner,
        "shared_intermediate": shared,
        "sparse_layers": len(sparse),
    }


def _listed(contents: Mapping[str, Any], name: str) -> set[int]:
    """The layers that a field lists."""
    listed = contents.get(name) or []
    if not isinstance(listed, list) or not all(_is_size(index) for index in listed):
        raise ValueError(f"{name} is {_brief(listed)}; it must be a list of layers, counted from 0")
    return set(listed)


def _flag(contents: Mapping[str, Any], name: str, default: bool) -> bool:
    value = contents.get(name)
    return default if value is None else bool(value)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _brief(value: object) -> str:
    """A value for an error message: shortened if it is a number with thousands of digits or a long list."""
    if isinstance(value, int) and value > LARGEST:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _require_finite(contents: object, name: str = "") -> None:
    """Raises `ValueError` for NaN, and for infinity unless it is an open limit, such as that of time steps."""
    waiting = [(name, contents)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.items()
        elif isinstance(value, list | tuple):
            waiting += [(name, item) for item in value]
        elif isinstance(value, float) and not (math.isfinite(value) or (value > 0 and str(name).endswith("_limit"))):
            raise ValueError(f"the configuration has {name} = {value}; it must be a finite number")
