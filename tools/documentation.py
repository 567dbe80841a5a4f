"""What mkdocs is told by a program: where the modules lie, and the options of the command line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "checkpoints", "scaling_laws")
COMMANDS = "<!-- commands -->"
TAG = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*>")
ADDRESS = re.compile(r"""\b(?:src|srcset|href)=["']?(?:https?:)?//""")
NOT_FETCHED = re.compile(r"""\brel=["']?(?:canonical|prev|next|edit)\b""")


def on_startup(**kwargs: Any) -> None:
    """Copy the modules to where they are when installed: mkdocs reads no map of setuptools and follows no links."""
    package = ROOT / "build" / "documented" / "parscale"
    shutil.rmtree(package.parent, ignore_errors=True)
    wanted = shutil.ignore_patterns("__pycache__", "small_model", "notebooks")
    shutil.copytree(ROOT / "parscale", package, ignore=wanted)
    for room in ROOMS:
        shutil.copytree(ROOT / room, package / room, ignore=wanted)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Put the commands where a page asks for them."""
    return markdown.replace(COMMANDS, command_reference()) if COMMANDS in markdown else markdown


def on_post_page(output: str, *, page: Any, **kwargs: Any) -> str:
    """Stop at a page that would fetch something from the network."""
    from mkdocs.exceptions import PluginError

    if found := fetched(output):
        raise PluginError(f"{page.file.src_uri} fetches from the network: {' '.join(found)}")
    return output


def fetched(html: str) -> list[str]:
    """The tags by which a page fetches something from elsewhere when it is opened."""
    return [tag for tag in TAG.findall(html) if ADDRESS.search(tag) and not NOT_FETCHED.search(tag)]


def commands() -> Iterator[tuple[str, Any]]:
    """Each command of `parscale` by its full name, as typer makes it of its function."""
    import typer

    from parscale.cli.application import app

    def below(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        for part, child in getattr(command, "commands", {}).items():
            yield from below(f"{name} {part}", child)
        if not hasattr(command, "commands"):
            yield name, command

    return below("parscale", typer.main.get_command(app))


def command_reference() -> str:
    """A section for each command: what it does, what it takes."""
    return "\n\n".join(_section(name, command) for name, command in commands())


def _section(name: str, command: Any) -> str:
    items = [item for item in command.params if item.name != "help" and not item.hidden]
    items.sort(key=lambda item: item.param_type_name == "option")
    rows = [f"| {_spelling(item)} | {_text(item)} |" for item in items]
    return "\n".join([f"## {name}", "", command.help or "", "", "| | |", "|---|---|", *rows])


def _spelling(item: Any) -> str:
    if item.param_type_name == "argument":
        return f"`{item.name.upper()}`"
    return ", ".join(f"`{spelling}`" for spelling in (*item.opts, *item.secondary_opts))


def _text(item: Any) -> str:
    text = (item.help or "").replace("|", "\\|")
    if item.required and item.param_type_name == "option":
        return f"{text} Required."
    if item.default is None or item.param_type_name == "argument" or getattr(item, "is_flag", False):
        return text
    return f"{text} Default: `{item.default}`."
