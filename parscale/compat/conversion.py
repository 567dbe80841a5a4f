"""transformers: its rules that rename, join and split the tensors of a model on the way to a file and back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from parscale.compat.names import needed, needed_module
from parscale.compat.patching import extend


def share_conversion(model_type: str, name: str) -> None:
    """Makes weights of type `name` use the conversion rules of `model_type`, if there are any.

    The experts of a mixture are stored one by one, and joined by rules that are looked up by model type. The functions
    that register rules are public in their module, but not documented.
    """
    module = needed_module("transformers.conversion_mapping")
    rules = needed(module, "get_checkpoint_conversion_mapping")(model_type)
    if rules is not None:
        needed(module, "register_checkpoint_conversion_mapping")(name, rules, overwrite=True)


def stored_name(model: PreTrainedModel, name: str) -> str:
    """The name of a model's tensor in a file: some classes save their modules under other names."""
    revert = needed(needed_module("transformers.core_model_loading"), "revert_weight_conversion")
    return next(iter(revert(model, {name: torch.empty(0)})))


def spare_from_conversion(spared: Callable[[str], bool]) -> None:
    """Makes rules that join or split tensors leave those alone whose names are spared; they are only renamed.

    Patterns of such rules match parts of names. One that joins the projections of queries, keys and values takes all
    tensors in these modules, also those that are not the layer's own. The classes of the rules are public in their
    module, but not documented.
    """
    converter = needed(needed_module("transformers.core_model_loading"), "WeightConverter")
    extend(converter, "rename_source_key", functools.partial(_without_spared, spared))


def _without_spared(
    spared: Callable[[str], bool], original: Callable[..., tuple[str, str | None]], rule: Any, name: str
) -> tuple[str, str | None]:
    """The name under a rule, and the pattern of it that matched, which is `None` if the rule does not apply."""
    return (name, None) if spared(name) else original(rule, name)
