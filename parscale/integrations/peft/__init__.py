"""Streams with PEFT: each adapter has its own streams, which are trained, saved and switched off with it.

PEFT freezes, saves and switches its own adapters, and ignores the rest of the model. So, if it is installed, its
methods are extended, once, for models that parscale wrapped: `parscale.compat.peft` says which and why. The copies of
streams that belong to an adapter are in `parscale.integrations.peft.copies`, and the supported methods in
`parscale.integrations.peft.methods`.
"""

from __future__ import annotations

from parscale.compat.peft import (
    MIXED_MODEL,
    MODEL,
    POLY,
    ROWS_OF_LAYERS,
    ROWS_OF_POLY,
    TUNER,
    Functions,
    Methods,
    extend_all,
)
from parscale.integrations.peft import files, lifecycle, rows
from parscale.streams.state import find_state

METHODS: Methods = {
    **{(cls, "__init__"): lifecycle.init for cls in (MODEL, MIXED_MODEL)},
    **{(cls, "add_adapter"): lifecycle.add_adapter for cls in (MODEL, MIXED_MODEL)},
    **{(cls, "set_adapter"): lifecycle.set_adapter for cls in (MODEL, MIXED_MODEL, TUNER)},
    **{(cls, "delete_adapter"): lifecycle.delete_adapter for cls in (MODEL, MIXED_MODEL, TUNER)},
    **{(cls, "disable_adapter"): lifecycle.disable_adapter for cls in (MODEL, MIXED_MODEL)},
    (MODEL, "save_pretrained"): files.save_pretrained,
    (MODEL, "load_adapter"): files.load_adapter,
    (MODEL, "get_prompt"): rows.get_prompt,
    (MODEL, ROWS_OF_LAYERS): rows.with_rows,
    (POLY, ROWS_OF_POLY): rows.with_tasks,
    (TUNER, "forward"): lifecycle.forward,
    (TUNER, "inject_adapter"): lifecycle.inject_adapter,
    (TUNER, "disable_adapter_layers"): lifecycle.disable_adapter_layers,
    (TUNER, "enable_adapter_layers"): lifecycle.enable_adapter_layers,
    (TUNER, "unload"): lifecycle.unload,
    (TUNER, "merge_and_unload"): lifecycle.merge_and_unload,
}
FUNCTIONS: Functions = {
    "prepare_model_for_kbit_training": (lifecycle.prepare_for_kbit_training, ()),
    # PEFT's own save_pretrained keeps the original function: the streams are written to a separate file
    "get_peft_model_state_dict": (files.get_state_dict, ("peft.peft_model",)),
    "set_peft_model_state_dict": (files.set_state_dict, ()),
    "hotswap_adapter": (files.hotswap_adapter, ()),
}


def extend_peft() -> None:
    """Makes PEFT handle the streams of wrapped models, if it is installed."""
    extend_all(METHODS, FUNCTIONS, lambda model: find_state(model) is not None)
