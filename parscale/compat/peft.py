"""PEFT: the methods and functions that parscale extends to support streams.

PEFT freezes, saves and switches its own adapters, and ignores the rest of the model; it has no hooks. So its methods
are extended, once for the process and for wrapped models only: other models get PEFT's own behaviour. The extensions
are in `parscale.integrations.peft`.

Most are public methods of public classes. Not documented are `BaseTuner`, which transformers' own `add_adapter` and
mixtures of adapters use; the module `peft.utils.hotswap`; and the two methods that see the per-row arguments of an
adapter's layers: `PeftModel._enable_peft_forward_hooks`, which every task's `forward` and `generate` enter, and
`PolyModel._manage_pre_hooks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from parscale.compat.names import needed, needed_module
from parscale.compat.patching import Extension, extend, extend_everywhere
from parscale.errors import IncompatibleVersionError

MODEL, MIXED_MODEL, POLY, TUNER = "PeftModel", "PeftMixedModel", "PolyModel", "BaseTuner"
ROWS_OF_LAYERS, ROWS_OF_POLY = "_enable_peft_forward_hooks", "_manage_pre_hooks"

# The extension of each method, by class and method.
Methods = Mapping[tuple[str, str], Extension]
# The extension of each function by name, and the modules that keep the original.
Functions = Mapping[str, tuple[Extension, Sequence[str]]]


def tuner_class() -> type:
    """The class that inserts an adapter's layers into a model."""
    return needed(needed_module("peft.tuners.tuners_utils"), TUNER)


def owner_of(name: str) -> Any:
    """The module that contains a function that parscale extends."""
    return needed_module("peft.utils.hotswap" if name == "hotswap_adapter" else "peft")


def extend_all(methods: Methods, functions: Functions, is_wrapped: Callable[[Any], bool]) -> None:
    """Extends PEFT if it is installed.

    If the installed version lacks one of the names, nothing is extended. Models without adapters still work, and an
    adapter for a wrapped model raises an error.

    Args:
        methods: extensions of methods.
        functions: extensions of functions.
        is_wrapped: whether a model has streams.
    """
    if not _can_be_imported():
        return
    try:
        owners = {name: _class_named(name) for name, _ in methods}
        for name, method in methods:
            needed(owners[name], method)
        for name in functions:
            needed(owner_of(name), name)
    except IncompatibleVersionError as error:
        _refuse_adapters(error, is_wrapped)
        return
    for (name, method), extension in methods.items():
        extend(owners[name], method, extension)
    for name, (extension, apart_from) in functions.items():
        extend_everywhere(owner_of(name), name, extension, apart_from)


def _can_be_imported() -> bool:
    """Whether adapters are possible: PEFT is installed, and fits the other installed packages."""
    try:
        needed_module("peft")
    except ImportError:
        return False
    return True


def _class_named(name: str) -> Any:
    return tuner_class() if name == TUNER else needed(needed_module("peft"), name)


def _refuse_adapters(error: IncompatibleVersionError, is_wrapped: Callable[[Any], bool]) -> None:
    """Makes every way to add an adapter in this version raise the error for a wrapped model."""
    message = str(error)

    def refuse(original: Callable[..., Any], self: object, model: object, *args: Any, **kwargs: Any) -> Any:
        if is_wrapped(model):
            raise IncompatibleVersionError(message)
        return original(self, model, *args, **kwargs)

    for name, method in ((MODEL, "__init__"), (MIXED_MODEL, "__init__"), (TUNER, "inject_adapter")):
        try:
            extend(_class_named(name), method, refuse)
        except IncompatibleVersionError:  # this version has no such way
            continue
