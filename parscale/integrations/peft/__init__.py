"""Streams under PEFT: each adapter has streams of its own, which train, are saved and are switched off with it.

PEFT freezes, saves and switches what its adapters own, and asks the model nothing about the rest. So, where it is
installed, its public methods for that are extended, once, for models that parscale wrapped. What belongs to which
adapter is in :mod:`parscale.integrations.peft.copies`, and which methods go with streams in
:mod:`parscale.integrations.peft.methods`.
"""

from __future__ import annotations

import importlib.util

from parscale.integrations.patching import extend, extend_everywhere
from parscale.integrations.peft import files, lifecycle, rows


def extend_peft() -> None:
    """Makes PEFT look after the streams of wrapped models, where it is installed."""
    if importlib.util.find_spec("peft") is None:
        return
    import peft
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import hotswap

    for cls in (peft.PeftModel, peft.PeftMixedModel):
        extend(cls, "__init__", lifecycle.init)
        extend(cls, "add_adapter", lifecycle.add_adapter)
        extend(cls, "set_adapter", lifecycle.set_adapter)
        extend(cls, "delete_adapter", lifecycle.delete_adapter)
        extend(cls, "disable_adapter", lifecycle.disable_adapter)
    extend(peft.PeftModel, "save_pretrained", files.save_pretrained)
    extend(peft.PeftModel, "load_adapter", files.load_adapter)
    extend(peft.PeftModel, "get_prompt", rows.get_prompt)
    # Every task's forward and generate enter it, and only it sees what goes to the layers.
    extend(peft.PeftModel, "_enable_peft_forward_hooks", rows.with_rows)
    extend(peft.PolyModel, "_manage_pre_hooks", rows.with_tasks)
    extend(BaseTuner, "forward", lifecycle.forward)
    extend(BaseTuner, "inject_adapter", lifecycle.inject_adapter)  # transformers' own add_adapter comes here too
    extend(BaseTuner, "set_adapter", lifecycle.set_adapter)
    extend(BaseTuner, "delete_adapter", lifecycle.delete_adapter)
    extend(BaseTuner, "disable_adapter_layers", lifecycle.disable_adapter_layers)
    extend(BaseTuner, "enable_adapter_layers", lifecycle.enable_adapter_layers)
    extend(BaseTuner, "unload", lifecycle.unload)
    extend(BaseTuner, "merge_and_unload", lifecycle.merge_and_unload)
    extend_everywhere(peft, "prepare_model_for_kbit_training", lifecycle.prepare_for_kbit_training)
    # save_pretrained takes PEFT's own, and writes the streams into a file of theirs
    extend_everywhere(peft, "get_peft_model_state_dict", files.get_state_dict, apart_from=["peft.peft_model"])
    extend_everywhere(peft, "set_peft_model_state_dict", files.set_state_dict)
    extend_everywhere(hotswap, "hotswap_adapter", files.hotswap_adapter)
