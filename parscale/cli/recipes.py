"""Recipes: files with options of commands, for runs that others may want to repeat."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

import parscale.checkpoints

RECIPES = Path(parscale.checkpoints.__file__).parent / "training" / "recipes"
"""The recipes of this package; their file names are their names."""


def read_recipe(name: str, command: str) -> dict[str, Any]:
    """What a recipe says of a command: values by its options' names, without dashes in front.

    Args:
        name: of a recipe of this package, or the path of a TOML file.
        command: such as `"train"`.

    Raises:
        ValueError: there is no such recipe, it cannot be read, or it says nothing of the command.
    """
    path = Path(name) if Path(name).suffix == ".toml" else RECIPES / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.toml")))
        raise ValueError(f"There is no recipe {name!r}; give one of {known}, or the path of a TOML file.")
    try:
        contents = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of text that is not UTF-8
        raise ValueError(f"{path} is not TOML: {error}") from error
    options = contents.get(command)
    if not isinstance(options, dict):
        raise ValueError(f"{path} says nothing of {command}; it needs a table [{command}] of option names and values.")
    return options


def _apply(context: typer.Context, name: str | None) -> str | None:
    """Makes what a recipe says the defaults of this call's options."""
    if name is None:
        return None
    command = context.info_name or ""
    parameters = {option.lstrip("-"): each for each in context.command.params for option in each.opts}
    defaults: dict[str, Any] = {}
    for option, value in read_recipe(name, command).items():
        if option not in parameters or option == "recipe":
            raise ValueError(f"The recipe {name} gives {command} {option!r}, which is not one of its options.")
        parameter = parameters[option]
        values = value if isinstance(value, list) else [value]
        if getattr(parameter, "multiple", False):  # which an argument has not
            if not all(isinstance(each, str) for each in values):
                raise ValueError(f"The recipe {name} gives {option!r} the value {value!r}; give a list of strings.")
            defaults[parameter.name] = values
        elif isinstance(value, list | dict):
            raise ValueError(f"The recipe {name} gives {option!r} the value {value!r}; give a single one.")
        else:
            defaults[parameter.name] = value if isinstance(value, bool) else str(value)
    context.default_map = {**(context.default_map or {}), **defaults}
    return name


Recipe = Annotated[
    str | None,
    typer.Option(
        help="Take options from a recipe: nd-lora, or a TOML file. Options on the command line take precedence.",
        metavar="NAME_OR_FILE",
        is_eager=True,
        callback=_apply,
    ),
]
