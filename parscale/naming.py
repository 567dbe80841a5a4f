"""Which of a model's tensors are streams', by their names, in memory and in checkpoints."""

from __future__ import annotations

import re

TRANSFORM_PART, AGGREGATOR_PART = "transform", "aggregator"
_PATTERNS = {
    TRANSFORM_PART: re.compile(r"(^|\.)(prefix_[kv]|prompt|stream_down|stream_up)(@[\w-]+)?$"),
    AGGREGATOR_PART: re.compile(r"(^|\.)aggregate_layer(@[\w-]+)?\."),
}
PATTERNS = [pattern.pattern for pattern in _PATTERNS.values()]
# What a set's transform has, by its name, in counts of parameters.
LABELS = {"prefix": "prefixes", "prompt": "prompts", "lora": "low_rank"}


def part_of(name: str) -> str | None:
    """``"transform"`` or ``"aggregator"`` for a tensor of streams; ``None`` for the backbone's."""
    return next((part for part, pattern in _PATTERNS.items() if pattern.search(name)), None)
