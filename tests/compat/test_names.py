"""A name that the installed version lacks is refused in one sentence: library, version, what to install."""

import sys
import types

import pytest

from parscale.compat import names
from parscale.errors import IncompatibleVersionError


@pytest.fixture
def library(monkeypatch):
    """A library of version 2.5 with one module and one class."""
    package, module = types.ModuleType("some_library"), types.ModuleType("some_library.utils")
    package.__version__, package.__path__, package.utils = "2.5", [], module
    package.__spec__ = module.__spec__ = types.SimpleNamespace(name="some_library")
    module.number = 3
    module.Model = type("Model", (), {"__module__": "some_library.utils", "run": lambda self: 4})
    for each in (package, module):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    monkeypatch.setattr(names.importlib.metadata, "requires", lambda name: ["torch>=2", "some_library>=2.0,<3"])
    return module


def test_what_is_there_is_given(library):
    assert names.needed(library, "number") == 3
    assert names.needed(library.Model, "run")(None) == 4
    assert names.needed_module("some_library.utils") is library


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        ("2.5", "pip install 'some_library<2.5,<3,>=2.0', or a newer parscale"),  # allowed: an older one may have it
        ("2.5+cpu", "pip install 'some_library<2.5,<3,>=2.0', or a newer parscale"),
        ("1.9", "pip install 'some_library<3,>=2.0'"),
        ("3.1", "pip install 'some_library<3,>=2.0'"),
    ],
)
def test_the_sentence(library, version, remedy):
    sys.modules["some_library"].__version__ = version
    for owner, path in ((library, "some_library.utils"), (library.Model, "some_library.utils.Model")):
        with pytest.raises(IncompatibleVersionError) as caught:
            names.needed(owner, "gone")
        assert str(caught.value) == (
            f"parscale needs {path}.gone, which the installed some_library {version} does not have: {remedy}."
        )


def test_a_module_that_is_gone(library):
    with pytest.raises(
        IncompatibleVersionError, match=r"needs some_library\.gone, which the installed some_library 2\.5"
    ):
        names.needed_module("some_library.gone")


def test_a_library_that_is_not_installed():
    with pytest.raises(ModuleNotFoundError, match="no_such_library") as caught:
        names.needed_module("no_such_library.utils")
    assert not isinstance(caught.value, IncompatibleVersionError)


def test_a_library_of_which_parscale_says_nothing(library, monkeypatch):
    monkeypatch.setattr(names.importlib.metadata, "requires", lambda name: [])
    with pytest.raises(IncompatibleVersionError, match="install another version of some_library, or a newer parscale"):
        names.needed(library, "gone")
