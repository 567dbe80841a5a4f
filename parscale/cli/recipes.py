"""Recipes: files with options of commands, for runs that are worth a name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import parscale.checkpoints

RECIPES = Path(parscale.checkpoints.__file__).parent / "training" / "recipes"
"""The recipes of this package; their file names are their names."""


def read_recipe(name: str, command: str) -> dict[str, Any]:
    """What a recipe says of a command: values by its options' names, without dashes in front.

    Args:
        name: of a recipe of this package, or the path of a YAML file.
        command: such as `"train"`.

    Raises:
        ValueError: there is no such recipe, it cannot be read, or it says nothing of the command.
    """
    import yaml

    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else RECIPES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
        raise ValueError(f"There is no recipe {name!r}; give one of {known}, or the path of a YAML file.")
    try:
        contents = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    options = contents.get(command) if isinstance(contents, dict) else None
    if not isinstance(options, dict):
        raise ValueError(f"{path} says nothing of {command}; it needs a mapping {command!r} of option names to values.")
    return options


def _apply(context: typer.Context, name: str | None) -> str | None:
    """Makes what a recipe says the defaults of this call's options."""
    if name is None:
        return None
    command = context.info_name or ""
    parameters = {option.lstrip("-"): each.name for each in context.command.params for option in each.opts}
    defaults = {}
    for option, value in read_recipe(name, command).items():
        if option not in parameters or option == "recipe":
            raise ValueError(f"The recipe {name} gives {command} {option!r}, which is none of its options.")
        plain = isinstance(value, bool | list) or value is None
        defaults[parameters[option]] = value if plain else str(value)
    context.default_map = {**(context.default_map or {}), **defaults}
    return name


Recipe = Annotated[
    str | None,
    typer.Option(
        help="Take options from a recipe: nd-lora, or a YAML file. Those given beside it count more.",
        metavar="NAME_OR_FILE",
        is_eager=True,
        callback=_apply,
    ),
]
