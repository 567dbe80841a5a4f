"""Functions of libraries are extended once, under all their names, and as soon as they are there."""

import importlib
import sys
import types

import pytest

from parscale.compat.patching import extend, extend_everywhere, when_imported


def twice(function, *args, **kwargs):
    """Twice what the function gives."""
    return 2 * function(*args, **kwargs)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A package with a function that a second module has imported by name."""
    (tmp_path / "some_library").mkdir()
    (tmp_path / "some_library" / "__init__.py").write_text("")
    (tmp_path / "some_library" / "utils.py").write_text("def number(n=1):\n    'Its own words.'\n    return n\n")
    (tmp_path / "some_library" / "user.py").write_text("from .utils import number\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield "some_library"
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.startswith("some_library")]:
        del sys.modules[name]


def test_a_method_is_extended_once():
    class Own:
        def number(self, n=1):
            """Its own words."""
            return n

    for _ in range(2):
        extend(Own, "number", twice)
    assert Own().number(n=3) == 6
    assert Own.number.__doc__ == "Its own words."


def test_a_function_is_extended_under_all_names(library):
    utils, user = importlib.import_module(f"{library}.utils"), importlib.import_module(f"{library}.user")
    script = types.ModuleType("some_library_script")
    script.renamed = utils.number
    sys.modules[script.__name__] = script
    for _ in range(2):
        extend_everywhere(utils, "number", twice)
    assert [utils.number(2), user.number(2), script.renamed(2)] == [4, 4, 4]


@pytest.mark.parametrize("first", [True, False], ids=["imported before", "imported later"])
def test_what_happens_once_a_module_is_there(library, first):
    if first:
        importlib.import_module(f"{library}.user")
    for _ in range(2):
        when_imported(f"{library}.utils", lambda module: extend_everywhere(module, "number", twice))
    assert importlib.import_module(f"{library}.user").number(2) == 4
    assert importlib.import_module(f"{library}.utils").number.__doc__ == "Its own words."


def test_a_module_that_is_not_there(library):
    when_imported(f"{library}.missing", lambda module: None)
    with pytest.raises(ModuleNotFoundError, match="missing"):
        importlib.import_module(f"{library}.missing")
