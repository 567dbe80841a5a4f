"""PEFT: the methods and functions that parscale extends, so that streams go with adapters.

PEFT freezes, saves and switches what its adapters own, and asks the model nothing about the rest; it has no hooks. So
its own methods are extended, once for the process and for wrapped models only: for any other model each does what it
did. What they are extended by is in `parscale.integrations.peft`.

Most are public methods of public classes. Without a documented name are `BaseTuner`, which transformers' own
`add_adapter` and mixtures of adapters go through; the module `peft.utils.hotswap`; and two methods that alone see
what goes to an adapter's layers, one entry for each row of the batch: `PeftModel._enable_peft_forward_hooks`, which
every task's `forward` and `generate` enter, and `PolyModel._manage_pre_hooks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from parscale.compat.names import needed, needed_module
from parscale.compat.patching import Extension, extend, extend_everywhere
from parscale.errors import IncompatibleVersionError

MODEL, MIXED_MODEL, POLY, TUNER = "PeftModel", "PeftMixedModel", "PolyModel", "BaseTuner"
ROWS_OF_LAYERS, ROWS_OF_POLY = "_enable_peft_forward_hooks", "_manage_pre_hooks"

# By class and method, what the method is extended by.
Methods = Mapping[tuple[str, str], Extension]
# By a function's name: what it is extended by, and the modules that keep it as it is.
Functions = Mapping[str, tuple[Extension, Sequence[str]]]


def tuner_class() -> type:
    """The class of what puts an adapter's layers into a model."""
    return needed(needed_module("peft.tuners.tuners_utils"), TUNER)


def owner_of(name: str) -> Any:
    """The module of a function that parscale extends."""
    return needed_module("peft.utils.hotswap" if name == "hotswap_adapter" else "peft")


def extend_all(methods: Methods, functions: Functions, is_wrapped: Callable[[Any], bool]) -> None:
    """Extends PEFT, where it is installed.

    Where the installed version lacks one of the names, none is extended. Models without adapters go on, and an adapter
    for a wrapped model is refused.

    Args:
        methods: what to extend which by.
        functions: the same.
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
    """Whether there can be adapters: PEFT is installed, and goes with what else is."""
    try:
        needed_module("peft")
    except ImportError:
        return False
    return True


def _class_named(name: str) -> Any:
    return tuner_class() if name == TUNER else needed(needed_module("peft"), name)


def _refuse_adapters(error: IncompatibleVersionError, is_wrapped: Callable[[Any], bool]) -> None:
    """Makes each way to an adapter that this version has raise the error for a wrapped model."""
    message = str(error)

    def refuse(function: Callable[..., Any], self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if is_wrapped(model):
            raise IncompatibleVersionError(message)
        return function(self, model, *args, **kwargs)

    for name, method in ((MODEL, "__init__"), (MIXED_MODEL, "__init__"), (TUNER, "inject_adapter")):
        try:
            owner = _class_named(name)
            needed(owner, method)
        except IncompatibleVersionError:  # then nothing comes this way
            continue
        extend(owner, method, refuse)
