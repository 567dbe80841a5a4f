"""Which of PEFT's methods go with streams."""

from __future__ import annotations

from typing import Any

from parscale.streams import ParScaleState


def has_prefix_cache(peft_config: Any) -> bool:
    """Whether the method hands the model a cache that is filled already."""
    return str(peft_config.peft_type.value) in ("PREFIX_TUNING", "CARTRIDGE")


def check_method(state: ParScaleState, peft_config: Any) -> None:
    """Refuses what does not go with streams."""
