"""Numbers in a configuration, under any architecture's field names."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any

LARGEST_SIZE = 10**12
"""The upper limit of every number in a model's shape."""

NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads"),
    "intermediate": (
        "block_ff_dim", "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "dff",
    ),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "active": (
        "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts",
        "num_selected_experts",
    ),
    "window": ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size"),
}  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """Whole numbers of a configuration, each under one of several names."""

    contents: Mapping[str, Any]
    model: str

    def optional(self, *names: str) -> int:
        """The first of `names` that is present; 0 if none is."""
        for name in names:
            value = self.contents.get(name)
            if isinstance(value, list) and value and all(is_size(item) for item in value):
                value = round(sum(value) / len(value))  # one for each layer: use their mean
            if value is None or isinstance(value, bool):
                continue
            if not is_size(value):
                raise ValueError(
                    f"the configuration of {self.model!r} has {name} = {brief(value)}; it must be a whole number of "
                    f"at least 0 and at most {LARGEST_SIZE:,}"
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


def listed_layers(contents: Mapping[str, Any], name: str) -> set[int]:
    """The layers that a field lists."""
    listed = contents.get(name) or []
    if not isinstance(listed, list) or not all(is_size(index) for index in listed):
        raise ValueError(f"{name} is {brief(listed)}; it must be a list of layers, counted from 0")
    return set(listed)


def require_one_each(kinds: Sized, layers: int, field: str) -> None:
    """Raises `ValueError` unless a field lists as many kinds as there are layers."""
    if len(kinds) != layers:
        raise ValueError(f"the configuration has {layers} layers and {len(kinds)} {field}; it must name one for each")


def is_size(value: object) -> bool:
    """Whether it is a whole number from 0 to `LARGEST_SIZE`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_SIZE


def brief(value: object) -> str:
    """A value for an error message: shortened if it is a number with thousands of digits or a long list."""
    if isinstance(value, int) and value > LARGEST_SIZE:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
