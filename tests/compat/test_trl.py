"""TRL makes its reference by the functions that parscale extends; a version without one says so when imported."""

import importlib
import inspect
import sys
import types
import warnings

import pytest

from parscale.compat import trl as compat

pytest.importorskip("trl")


def test_the_functions_are_there_and_trainers_call_them():
    utils = importlib.import_module(compat.MODULE)
    name, create = (inspect.unwrap(getattr(utils, each)) for each in (compat.NAME, compat.CREATE))
    assert name(types.SimpleNamespace(_name_or_path="folder", name_or_path="folder")) == "folder"
    assert next(iter(inspect.signature(create).parameters)) == "model_id"
    trainer = importlib.import_module("trl.trainer.dpo_trainer")
    used = set(inspect.getsource(trainer.DPOTrainer).replace("(", " ").split())
    assert {compat.NAME, compat.CREATE} <= used


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A TRL that is not imported yet, with the functions that a test writes."""

    def write(source):
        (tmp_path / "trl" / "trainer").mkdir(parents=True)
        (tmp_path / "trl" / "__init__.py").write_text("__version__ = '9.0'\n")
        (tmp_path / "trl" / "trainer" / "__init__.py").write_text("")
        (tmp_path / "trl" / "trainer" / "utils.py").write_text(source)

    for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield write
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
        del sys.modules[name]


BOTH = (
    "def get_config_model_id(config):\n    return 'a'\n\ndef create_model_from_path(model_id):\n    return model_id\n"
)


def test_both_are_extended_once_the_library_is_imported(library):
    library(BOTH)
    compat.extend_reference(lambda own, config: own(config) + "b", lambda own, model_id: own(model_id) + "c")
    utils = importlib.import_module(compat.MODULE)
    assert utils.create_model_from_path(utils.get_config_model_id(None)) == "abc"


def test_a_version_without_one_says_so_and_is_left_as_it_is(library):
    library(BOTH.replace("create_model_from_path", "create_model"))
    compat.extend_reference(lambda own, config: "ours", lambda own, model_id: "ours")
    with pytest.warns(UserWarning, match=r"trl\.trainer\.utils\.create_model_from_path, which the installed trl 9\.0"):
        utils = importlib.import_module(compat.MODULE)
    assert utils.get_config_model_id(None) == "a"


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(compat, "is_installed", lambda name: False)
    finders = list(sys.meta_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.extend_reference(None, None)
    assert sys.meta_path == finders
