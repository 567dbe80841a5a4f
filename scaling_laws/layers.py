"""What each layer of a configuration is, and its attention."""

from __future__ import annotations

import dataclasses
from collections import ChainMap, Counter
from collections.abc import Mapping
from typing import Any

from parscale.scaling_laws.fields import LARGEST_SIZE, NAMES, Reader, brief, is_size, listed_layers, require_one_each
from parscale.scaling_laws.shapes import Attention
from parscale.scaling_laws.states import with_state

# Fields that list what each layer is; one of numbers has a 1 for a window.
KINDS = ("layer_types", "layers_block_type", "hybrid_layer_pattern")
# Every how manieth layer attends to everything where the configuration does not say; the others have a window.
FULL_ATTENTION_STEP = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "llama4_text": 4}
# Families with heads, but none of attention.
WITHOUT_ATTENTION = {"mamba2", "xlstm"}
# Families with layers of several kinds that only a list tells apart; the second ones only if they have a window.
LISTED = {
    "kimi_linear", "lara_mini", "lfm3", "minimax", "modernbert-decoder", "olmo_hybrid", "qwen3_5_text",
    "qwen3_5_moe_text", "qwen3_next",
}  # fmt: skip
LISTED_WINDOWS = {
    "afmoe", "beam", "cohere_compass_text", "cwm", "diffusion_gemma_text", "dots1", "dots3_note_text",
    "embedding_gemma2_text", "flint", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "gpt_oss", "granite_swa",
    "granitemoe_swa", "inkling_text", "inkling2_text", "kolibri1", "laguna", "mellum", "mimo_v2_flash",
    "muse_glimmer_text", "olmo3", "vaultgemma",
}  # fmt: skip
# The other kinds of layers that are counted; some keep a state of constant size in place of keys.
COUNTED = {
    "full_attention", "sliding_attention", "chunked_attention", "indexed_attention", "linear_attention", "attention",
    "deepseek_sparse_attention", "hybrid", "hybrid_sliding", "mamba", "recurrent", "conv", "cross",
}  # fmt: skip
# Families whose attention multiplies what it returns with a gate.
GATED = {
    "afmoe", "beam", "hy_v4", "inkling2_text", "muse_glimmer_text", "qwen3_next", "qwen3_5_text",
}  # fmt: skip
# Families with DeepSeek-V3.2's indexer, and every how manieth layer has one of its own; the others use its choice.
INDEXER_STEP = {"axk2": 1, "deepseek_v32": 1, "dots3_note_text": 1, "glm_moe_dsa": 1, "hy_v4": 4}

# Fields that may differ by layer: in a list, in `per_layer_config`, or between layers with a window and those without.
BY_LAYER = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "sliding_window",
)  # fmt: skip
OTHER_LISTS = {"num_attention_heads": "num_attention_heads_per_layer"}
WITHOUT_WINDOW = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
# Families with several times as many key heads in layers with a window, where no field says so.
WINDOW_KV_HEADS = {"mimo_v2_flash": 2}


def layer_kinds(contents: Mapping[str, Any], name: str, layers: int) -> list[str]:
    """What each layer is, in the words of `layer_types`; some families, and files of older code, have other fields."""
    full, number = "full_attention", Reader(contents, name)
    for field in KINDS:
        kinds = contents.get(field)
        if isinstance(kinds, list | str) and kinds:
            require_one_each(kinds, layers, field)
            named = [{"0": full, "1": "sliding_attention"}.get(str(kind), str(kind)) for kind in kinds]
            if unknown := sorted(set(named) - COUNTED):
                raise ValueError(
                    f"{field} of {name!r} names layers of the kind {brief(unknown[0])}, whose cost is not counted; "
                    f"counted are {', '.join(sorted(COUNTED))}"
                )
            return named
    if name in WITHOUT_ATTENTION:
        return ["mamba"] * layers
    if "attn_layer_indices" in contents:
        listed = listed_layers(contents, "attn_layer_indices")
        return [full if i in listed else "mamba" for i in range(layers)]
    if listed := listed_layers(contents, "cross_attention_layers"):  # whose keys are those of images
        return ["cross" if i in listed else full for i in range(layers)]
    if isinstance(blocks := contents.get("block_types"), list) and blocks:  # repeated; all attention has a window
        return [str(blocks[i % len(blocks)]).replace("attention", "sliding_attention") for i in range(layers)]

    def one_in(step: int, place: int, others: str) -> list[str]:
        return [full if i % step == place else others for i in range(layers)]

    if step := number.optional("full_attention_interval", "layer_group_size"):
        return one_in(step, step - 1, "linear_attention")
    if step := number.optional("attn_layer_period"):
        return one_in(step, number.optional("attn_layer_offset"), "mamba")
    windowed = number.optional(*NAMES["window"]) and contents.get("use_sliding_window", True)
    if name in LISTED or (windowed and name in LISTED_WINDOWS):
        raise ValueError(
            f"the configuration of {name!r} has no layer_types, and no other field says which of its layers have a "
            "window or a state; give the file that transformers saves (AutoConfig.from_pretrained, save_pretrained)"
        )
    if windowed:
        pattern = contents.get("sliding_window_pattern", FULL_ATTENTION_STEP.get(name))
        if isinstance(pattern, str) and pattern:  # a letter for each layer, G for those that attend to everything
            return [full if pattern[i % len(pattern)] == "G" else "sliding_attention" for i in range(layers)]
        step = pattern if is_size(pattern) and pattern else layers + 1
        return one_in(step, step - 1, "sliding_attention")
    return [full] * layers


def attention_of_layers(
    contents: Mapping[str, Any], name: str, kinds: list[str], borrowers: int
) -> tuple[Attention, ...]:
    """The attention of all layers, with one entry for those that are alike.

    Args:
        contents: of a `config.json`.
        name: its model type.
        kinds: as `layer_kinds` gives them.
        borrowers: how many layers, the last ones, read keys and values of earlier layers.
    """
    listed, named, indexed = _lists(contents, len(kinds)), _named(contents), _indexed(Reader(contents, name), kinds)
    layers: Counter[tuple[str, bool, bool, frozenset[tuple[str, int | None]]]] = Counter()
    for layer, kind in enumerate(kinds):
        own = {field: values[layer] for field, values in listed.items()} | named.get(layer, {})
        layers[kind, layer >= len(kinds) - borrowers, indexed[layer], frozenset(own.items())] += 1
    alike: Counter[Attention] = Counter()
    for (kind, borrows, has_indexer, changed), count in layers.items():
        fields = Reader(ChainMap(dict(changed), _of_kind(Reader(contents, name), kind), dict(contents)), name)
        attention = with_state(fields, kind, _state(fields, kind) or _attention(fields, kind, borrows))
        if has_indexer:
            heads, size = fields.needed("index_n_heads"), fields.needed("index_head_dim")
            attention = dataclasses.replace(attention, indexer_heads=heads, indexer_dim=size)
        alike[attention] += count
    return tuple(dataclasses.replace(attention, layers=count) for attention, count in alike.items())


def _lists(contents: Mapping[str, Any], layers: int) -> dict[str, list[int | None]]:
    """The fields of attention that list a number for each layer."""
    found = {field: contents.get(OTHER_LISTS.get(field, field)) or contents.get(field) for field in BY_LAYER}
    return {
        field: values
        for field, values in found.items()
        if isinstance(values, list) and len(values) == layers and all(map(is_size, values))
    }


def _named(contents: Mapping[str, Any]) -> dict[int, dict[str, int | None]]:
    """The fields that `per_layer_config` gives to single layers."""
    named = contents.get("per_layer_config") or {}
    if not isinstance(named, Mapping) or not all(
        str(layer).isdecimal() and isinstance(fields, Mapping) for layer, fields in named.items()
    ):
        raise ValueError(f"per_layer_config is {brief(named)}; it must give fields to layers, by their numbers")
    for layer, fields in named.items():
        for field, value in fields.items():
            if field not in BY_LAYER:
                raise ValueError(
                    f"per_layer_config has {field!r} for layer {layer}, and costs are counted where layers differ in "
                    f"{', '.join(BY_LAYER)} alone"
                )
            if value is not None and not is_size(value):
                raise ValueError(
                    f"per_layer_config has {field} = {brief(value)} for layer {layer}; it must be a whole number of at "
                    f"least 0 and at most {LARGEST_SIZE:,}"
                )
    return {int(layer): dict(fields) for layer, fields in named.items()}


def _of_kind(number: Reader, kind: str) -> dict[str, int]:
    """The fields that layers with a window, or those without, have in place of the model's."""
    if "sliding" in kind:
        fields = {field: number.optional(f"swa_{field}") for field in BY_LAYER}
        if not fields["num_key_value_heads"] and number.model in WINDOW_KV_HEADS:
            fields["num_key_value_heads"] = WINDOW_KV_HEADS[number.model] * number.optional("num_key_value_heads")
    else:
        fields = {field: number.optional(other) for field, other in WITHOUT_WINDOW.items()}
        if not number.contents.get("attention_k_eq_v", True):
            del fields["num_key_value_heads"]
    return {field: value for field, value in fields.items() if value}


def _indexed(number: Reader, kinds: list[str]) -> list[bool]:
    """Whether each layer has an indexer of its own."""
    contents, layers = number.contents, len(kinds)
    if number.model not in INDEXER_STEP or contents.get("use_dsa") is False:
        return [False] * layers
    modes = contents.get("indexer_types") or contents.get("index_topk_pattern")
    if modes is not None:
        if not isinstance(modes, list | str) or len(modes) != layers:
            raise ValueError(f"indexer_types is {brief(modes)}; it must name one for each of the {layers} layers")
        own = [mode not in ("shared", "S") for mode in modes]
    else:
        step = number.optional("index_topk_freq") or INDEXER_STEP[number.model]
        offset = number.optional("index_skip_topk_offset") or 2
        own = [max(i - offset + 1, 0) % step == 0 for i in range(layers)]
    # Files that name the sizes of single layers name those with an indexer as well.
    without = {"sliding_attention"} | ({"full_attention"} if contents.get("per_layer_config") else set())
    return [each and kind not in without for each, kind in zip(own, kinds, strict=True)]


def _state(number: Reader, kind: str) -> Attention | None:
    """A layer with a state in place of keys, by the width of its projections; None if no field says so.

    What linear attention, state spaces and convolutions project is written as queries, keys, values and a gate.
    """
    hidden = number.needed("hidden")
    keys = values = 0
    gated = True
    if kind == "conv":
        keys, values, gated = hidden, hidden, False
    elif kind == "recurrent":
        values = number.optional("lru_width") or hidden
    elif kind in ("mamba", "linear_attention"):
        keys = number.optional("linear_num_key_heads") * number.optional("linear_key_head_dim")
        values = number.optional("linear_num_value_heads") * number.optional("linear_value_head_dim")
        keys = keys or number.optional("linear_num_heads") * number.optional("linear_head_dim")
        values = values or keys or number.optional("mamba_expand") * hidden
        if number.model == "minimax":
            heads = number.needed("heads")
            keys = values = heads * (number.optional("head_dim") or hidden // heads)
    if not values:
        return None
    return Attention(1, 1, 1, keys, values, keys="none", gated=gated)


def _attention(number: Reader, kind: str, borrows: bool) -> Attention:
    """The attention of one layer, whose fields `number` reads."""
    heads = number.needed("heads")
    kv_heads = _kv_heads(number, heads)
    head_dim = number.optional("head_dim", "attention_head_dim", "kv_channels") or number.needed("hidden") / heads
    latent = number.optional("kv_lora_rank")
    rope = number.optional("qk_rope_head_dim") if latent else 0
    if latent:
        head_dim, kv_heads = number.optional("qk_nope_head_dim") + rope, heads
    reads = ("attention" in kind or "hybrid" in kind) and "linear" not in kind
    windowed = ("sliding" in kind or "chunked" in kind) and number.contents.get("use_sliding_window", True)
    return Attention(
        layers=1,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=number.optional("v_head_dim") or head_dim,
        keys="none" if not reads else "borrowed" if borrows else "own",
        window=number.optional(*NAMES["window"]) if windowed else 0,
        keys_are_values=bool(number.contents.get("attention_k_eq_v")) and "sliding" not in kind,
        query_rank=number.optional("q_lora_rank") if latent else 0,
        kv_rank=latent,
        rope_dim=rope,
        gated=number.model in GATED,
    )


def _kv_heads(number: Reader, heads: int) -> int:
    multi_query = number.contents.get("multi_query") and not number.contents.get("new_decoder_architecture")
    if multi_query and number.model in ("falcon", "gpt_bigcode"):
        return 1
    kv_heads = (
        number.optional("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_n_heads", "multi_query_group_num")
        or heads
    )
    if heads % kv_heads and not isinstance(number.contents.get("num_key_value_heads"), list):
        raise ValueError(
            f"the configuration of {number.model!r} has {heads} heads and {kv_heads} key/value heads; the first must "
            "be a multiple of the second"
        )
    return kv_heads
