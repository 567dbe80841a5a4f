"""What each layer of a configuration is, and its attention."""

from __future__ import annotations

import dataclasses
from collections import ChainMap, Counter
from collections.abc import Mapping
from typing import Any

from parscale.scaling_laws.fields import LARGEST, NAMES, Reader, brief, is_size, listed_layers
from parscale.scaling_laws.shapes import Attention

# Fields that list what each layer is; one of letters has a star for attention, one of numbers a 1 for a window.
KINDS = ("layer_types", "layers_block_type", "hybrid_override_pattern", "hybrid_layer_pattern")
# Every how manieth layer attends to everything where the configuration does not say; the others have a window.
FULL_ATTENTION_STEP = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "llama4_text": 4}
# Families with heads, but none of attention.
WITHOUT_ATTENTION = {"mamba2", "xlstm"}

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
            if len(kinds) != layers:
                raise ValueError(
                    f"the configuration has {layers} layers and {len(kinds)} {field}; it must name one for each"
                )
            return [{"*": full, "0": full, "1": "sliding_attention"}.get(str(kind), str(kind)) for kind in kinds]
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

    if step := number.optional("full_attention_interval"):
        return one_in(step, step - 1, "linear_attention")
    if step := number.optional("attn_layer_period"):
        return one_in(step, number.optional("attn_layer_offset"), "mamba")
    if number.optional(*NAMES["window"]) and contents.get("use_sliding_window", True):
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
    listed, named = _lists(contents, len(kinds)), _named(contents)
    layers: Counter[tuple[str, bool, frozenset[tuple[str, int | None]]]] = Counter()
    for layer, kind in enumerate(kinds):
        own = {field: values[layer] for field, values in listed.items()} | named.get(layer, {})
        layers[kind, layer >= len(kinds) - borrowers, frozenset(own.items())] += 1
    alike: Counter[Attention] = Counter()
    for (kind, borrows, changed), count in layers.items():
        fields = ChainMap(dict(changed), _of_kind(Reader(contents, name), kind), dict(contents))
        alike[_attention(Reader(fields, name), kind, borrows)] += count
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
                    f"least 0 and at most {LARGEST:,}"
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
