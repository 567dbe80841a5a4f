"""Which of PEFT's methods support streams; `docs/peft.md` shows the table."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterable
from itertools import accumulate
from typing import Any, Protocol

from parscale.config import LORA, PROMPT
from parscale.streams.naming import AGGREGATOR


class AdapterConfig(Protocol):
    """The part of a PEFT configuration that every method has."""

    peft_type: Any
    inference_mode: bool


@dataclasses.dataclass(frozen=True)
class PeftMethod:
    """How a method of PEFT works with streams.

    Attributes:
        refused: the reason why it does not.
        keeps_outputs: it leaves the outputs of linear layers, or only adds to them, so that the low-rank differences of
            `transform="lora"` stay valid, even after a merge. Other methods use the weights of the layer, or scale its
            output.
        fills_cache: it passes a filled cache to the model.
    """

    refused: str = ""
    keeps_outputs: bool = True
    fills_cache: bool = False


_KEEPS_OUTPUTS = PeftMethod()
_CHANGES_LAYERS = PeftMethod(keeps_outputs=False)
_FILLS_CACHE = PeftMethod(fills_cache=True)

METHODS: dict[str, PeftMethod] = {
    "ADALORA": _KEEPS_OUTPUTS,
    "ADAMSS": _KEEPS_OUTPUTS,
    "ADAPTION_PROMPT": _KEEPS_OUTPUTS,
    "BEFT": _KEEPS_OUTPUTS,
    "BOFT": _CHANGES_LAYERS,
    "C3A": _KEEPS_OUTPUTS,
    "CARTRIDGE": _FILLS_CACHE,
    "CPT": _KEEPS_OUTPUTS,
    "DEFT": _CHANGES_LAYERS,
    "DELORA": _KEEPS_OUTPUTS,
    "FOURIERFT": _KEEPS_OUTPUTS,
    "FROD": _CHANGES_LAYERS,
    "GLORA": _CHANGES_LAYERS,
    "GRALORA": _KEEPS_OUTPUTS,
    "HIRA": _KEEPS_OUTPUTS,
    "HRA": _CHANGES_LAYERS,
    "IA3": _CHANGES_LAYERS,
    "LILY": _KEEPS_OUTPUTS,
    "LN_TUNING": _KEEPS_OUTPUTS,
    "LOHA": _KEEPS_OUTPUTS,
    "LOKR": _KEEPS_OUTPUTS,
    "LORA": _KEEPS_OUTPUTS,
    "MISS": _KEEPS_OUTPUTS,
    "MULTITASK_PROMPT_TUNING": _KEEPS_OUTPUTS,
    "OFT": _CHANGES_LAYERS,
    "OSF": _CHANGES_LAYERS,
    "PEANUT": _KEEPS_OUTPUTS,
    "POLY": _KEEPS_OUTPUTS,
    "PREFIX_TUNING": _FILLS_CACHE,
    "PROMPT_TUNING": _KEEPS_OUTPUTS,
    "PSOFT": _KEEPS_OUTPUTS,
    "PVERA": _KEEPS_OUTPUTS,
    "P_TUNING": _KEEPS_OUTPUTS,
    "RANDLORA": _KEEPS_OUTPUTS,
    "ROAD": _CHANGES_LAYERS,
    "SHADOW": PeftMethod(refused="its second, smaller model reads B rows, but the layers of P streams have P*B"),
    "SHIRA": _CHANGES_LAYERS,
    "SUPERTUNING": _CHANGES_LAYERS,
    "TINYLORA": _KEEPS_OUTPUTS,
    "TRAINABLE_TOKENS": _KEEPS_OUTPUTS,
    "UNILORA": _KEEPS_OUTPUTS,
    "VBLORA": _KEEPS_OUTPUTS,
    "VERA": _KEEPS_OUTPUTS,
    "WAVEFT": _KEEPS_OUTPUTS,
    "XLORA": PeftMethod(refused="it weights adapters for each of B rows, but the layers of P streams have P*B"),
}
UNKNOWN = _KEEPS_OUTPUTS  # for a method in a newer PEFT, after a warning


def method_of(peft_config: AdapterConfig) -> PeftMethod:
    """How the method of a configuration works with streams."""
    return METHODS.get(name_of(peft_config), UNKNOWN)


def name_of(peft_config: AdapterConfig) -> str:
    """The name of the method."""
    return str(getattr(peft_config.peft_type, "value", peft_config.peft_type))


def check_method(peft_config: AdapterConfig, transforms: Collection[str], holders: Iterable[str]) -> None:
    """Checks that an adapter supports the streams of a model.

    Args:
        peft_config: the adapter's configuration.
        transforms: of the model's sets with more than one stream.
        holders: as in `check_copied_modules`.

    Raises:
        ValueError: it does not support them.
    """
    if not transforms:
        return
    name = name_of(peft_config)
    if name not in METHODS:
        warnings.warn(
            f"PEFT's {name} is newer than this version of parscale, which has not been tested with it: compare outputs "
            "with and without streams before you rely on it.",
            stacklevel=4,
        )
    reason = _reason(name, method_of(peft_config), peft_config, transforms)
    if reason:
        raise ValueError(f"This adapter does not support streams: {reason}")
    check_copied_modules(peft_config, holders)


def check_copied_modules(peft_config: AdapterConfig, holders: Iterable[str]) -> None:
    """Checks that an adapter copies no module that streams depend on: PEFT runs and trains the copy, without them.

    Args:
        peft_config: the adapter's configuration.
        holders: the names of these modules in the model.

    Raises:
        ValueError: `modules_to_save` names one, or a module around one.
    """
    wanted = getattr(peft_config, "modules_to_save", None) or ()
    for holder in holders:
        around = list(accumulate(holder.split("."), "{}.{}".format))  # from the outermost module to the holder
        copied = next(((module, entry) for module in around for entry in wanted if module.endswith(entry)), None)
        if copied is not None:
            module, entry = copied
            raise ValueError(
                f"This adapter does not support streams: modules_to_save with {entry!r}: PEFT would train a copy of "
                f"{module} in its place, without the streams that {holder} has. Omit it, or name it in target_modules; "
                "modules without streams, such as embeddings, head and norms, can be saved."
            )


def _reason(name: str, method: PeftMethod, peft_config: AdapterConfig, transforms: Collection[str]) -> str:
    if method.refused:
        return f"{name}: {method.refused}. Use another method (see docs/peft.md), or unwrap the model first."
    if LORA in transforms and not method.keeps_outputs:
        return (
            f"{name} with transform={LORA!r}: it uses the weights of the layers in whose outputs the streams "
            "differ. Use LoRA, or streams with transform='prefix'."
        )
    if LORA in transforms and getattr(peft_config, "use_dora", False):
        return (
            f"use_dora=True with transform={LORA!r}: DoRA scales the outputs in which the streams differ. Omit "
            "it, or use streams with transform='prefix'."
        )
    if PROMPT in transforms and method.fills_cache:
        return (
            f"{name} with transform={PROMPT!r}: both add tokens before the text in the first pass of a cache. Use "
            "PROMPT_TUNING, or streams with transform='prefix'."
        )
    if getattr(peft_config, "layer_replication", None):
        return "layer_replication: the copies of layers would have no streams. Replicate the layers first, then wrap."
    for field in ("target_modules", "target_parameters", "modules_to_save"):
        value = getattr(peft_config, field, None) or ()
        if any(AGGREGATOR in entry for entry in ([value] if isinstance(value, str) else value)):
            return f"{field} with {AGGREGATOR!r}: streams are trained and saved with every adapter anyway. Omit it."
    return ""
