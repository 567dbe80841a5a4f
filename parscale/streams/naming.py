"""Recognizes the tensors of streams by name, in memory and in checkpoints."""

from __future__ import annotations

import re

from parscale.config import LORA, PREFIX, PROMPT

# The names of a transform's parameters in the modules that hold them.
PARAMETERS = {PREFIX: ("prefix_k", "prefix_v"), PROMPT: ("prompt",), LORA: ("stream_down", "stream_up")}
TRANSFORM_PART, AGGREGATOR_PART = "transform", "aggregator"
AGGREGATOR = "aggregate_layer"
COPY = "@@"  # in the names of a copy for an adapter, before its number
_NAMES = "|".join(name for names in PARAMETERS.values() for name in names)
_PATTERNS = {
    TRANSFORM_PART: re.compile(rf"(^|\.)({_NAMES})(@[\w-]+)?({COPY}\d+)?$"),
    AGGREGATOR_PART: re.compile(rf"(^|\.){AGGREGATOR}(@[\w-]+)?({COPY}\d+)?\."),
}
# The label of each transform's parameters, in counts of parameters.
LABELS = {PREFIX: "prefixes", PROMPT: "prompts", LORA: "low_rank"}


def is_of_streams(name: str) -> bool:
    """Whether a tensor belongs to streams and not to the backbone."""
    return part_of(name) is not None


def is_copy(name: str) -> bool:
    """Whether a tensor of streams belongs to an adapter's copy."""
    return is_of_streams(name) and COPY in name


def is_further(name: str) -> bool:
    """Whether a tensor belongs to a set with another name than the default, or to an adapter's copy of a set."""
    return is_of_streams(name) and "@" in name


def part_of(name: str) -> str | None:
    """`"transform"` or `"aggregator"` for a tensor of streams; `None` for the backbone's."""
    return next((part for part, pattern in _PATTERNS.items() if pattern.search(name)), None)
