"""Settings are described once, in the docstrings of their classes; all that shows them says the same."""

import dataclasses
import importlib.util
import inspect
import re
from pathlib import Path
from typing import TypeVar, get_type_hints

import pytest
import typer

import parscale
from parscale import ParScaleConfig
from parscale.checkpoints import TrainSettings
from parscale.cli.application import app
from parscale.descriptions import descriptions, labels
from parscale.methods import add_streams

ROOT = Path(__file__).parents[1]
CLASSES = (ParScaleConfig, TrainSettings)


@dataclasses.dataclass
class Example:
    """An example.

    Attributes:
        one: The first, `code`: it goes on
            over two lines.
        two: The second.

    Raises:
        ValueError: never.
    """

    one: int = 1
    two: int = 2


def test_descriptions_are_those_of_the_docstring():
    assert descriptions(Example) == {"one": "The first, `code`: it goes on over two lines.", "two": "The second."}
    assert labels(Example) == {"one": "The first, code", "two": "The second"}


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_is_described(cls):
    assert list(descriptions(cls)) == [field.name for field in dataclasses.fields(cls)]
    assert all(text.endswith(".") for text in descriptions(cls).values())
    assert len(set(labels(cls).values())) == len(labels(cls))


def options(command):
    """A command's options by name."""
    (found,) = [each for name, each in typer.main.get_command(app).commands.items() if name == command]
    return {parameter.name: parameter for parameter in found.params}


@pytest.mark.parametrize(("command", "cls"), [("train", TrainSettings), ("convert", ParScaleConfig)])
def test_a_command_has_an_option_for_each_setting(command, cls):
    found = options(command)
    for field in dataclasses.fields(cls):
        option = found[field.name]
        assert option.opts == [f"--{field.name.replace('_', '-')}"]
        assert option.help == descriptions(cls)[field.name].replace("`", "")
        if not option.required and field.default is not dataclasses.MISSING:
            assert option.default == field.default


@pytest.mark.parametrize("function", [parscale.wrap, add_streams])
def test_functions_take_the_numbers_of_a_set_as_its_class_does(function):
    parameters, types = inspect.signature(function).parameters, get_type_hints(ParScaleConfig)
    for field in dataclasses.fields(ParScaleConfig):
        assert parameters[field.name].default == field.default, field.name
        if field.name != "num_streams":  # a whole configuration may stand there
            assert get_type_hints(function)[field.name] == types[field.name]
    others = set(parameters) - {field.name for field in dataclasses.fields(ParScaleConfig)}
    assert others <= {"model", "name", "calibration", "kernels"}


@pytest.mark.parametrize("function", [parscale.wrap, parscale.unwrap])
def test_the_class_of_a_model_stays_for_type_checkers(function):
    types = get_type_hints(function)
    assert isinstance(types["model"], TypeVar)
    assert types["return"] is types["model"]


def test_the_documentation_lists_the_settings():
    specification = importlib.util.spec_from_file_location("settings_page", ROOT / "tools" / "settings_page.py")
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == tool.page(), "run: .venv/bin/python tools/settings_page.py"
    rows = re.findall(r"^\| `(\w+)` \| .* \| .* \|$", page, re.MULTILINE)
    assert rows == [field.name for cls in CLASSES for field in dataclasses.fields(cls)]
