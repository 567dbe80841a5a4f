"""Extends functions of libraries that offer no hooks, and replaces attributes for a block of code."""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from parscale.compat.names import needed

Extension = Callable[..., Any]  # takes the original function, then its arguments


def extend(owner: object, name: str, extension: Extension) -> None:
    """Replaces a class's method or a module's function by `extension(original, *its_arguments)`, once.

    Raises:
        IncompatibleVersionError: the installed version has no such name.
    """
    function = needed(owner, name)
    if not _is_extended(function):
        setattr(owner, name, _extended(function, extension))


def extend_everywhere(owner: ModuleType, name: str, extension: Extension, apart_from: Sequence[str] = ()) -> None:
    """Like `extend` for a module's function, but also in the modules that have imported it by name.

    Args:
        owner: the module.
        name: name of the function.
        extension: takes the original function, then its arguments.
        apart_from: names of modules that keep the original function.

    Raises:
        IncompatibleVersionError: the installed version has no such name.
    """
    function = needed(owner, name)
    if _is_extended(function):
        return
    extended = _extended(function, extension)
    for module in [module for key, module in list(sys.modules.items()) if key not in apart_from]:
        names = [key for key, value in list(getattr(module, "__dict__", {}).items()) if value is function]
        for key in names:
            setattr(module, key, extended)


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """In this block an attribute of an object or a module has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def when_imported(name: str, act: Callable[[ModuleType], None]) -> None:
    """Calls `act` with a module: now if it is already imported, otherwise when it is imported."""
    if name in sys.modules:
        act(sys.modules[name])
    elif not any(isinstance(finder, _Watch) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch(name, act))


class _Watch(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, and calls a function after it has been executed."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.act = act

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_act(module: ModuleType) -> None:
                run(module)
                self.act(module)

            spec.loader.exec_module = run_and_act  # type: ignore[method-assign]
        return spec


def _extended(function: Callable[..., Any], extension: Extension) -> Callable[..., Any]:
    @functools.wraps(function)
    def extended(*args: Any, **kwargs: Any) -> Any:
        return extension(function, *args, **kwargs)

    extended.extended_by_parscale = True  # type: ignore[attr-defined]
    return extended


def _is_extended(function: object) -> bool:
    return getattr(function, "extended_by_parscale", False)
