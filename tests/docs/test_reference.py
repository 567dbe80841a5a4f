"""Every public name is in the reference, and its docstring says what goes in, what comes out and what fails."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import pydoc
import re
import textwrap
from pathlib import Path

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

from parscale import wrap

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
PACKAGES = ("parscale", "parscale.checkpoints", "parscale.kernels", "parscale.scaling_laws")
SHOWN = [
    path for page in sorted(REFERENCE.glob("*.md")) for path in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.M)
]
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):$", flags=re.M)
ARRAYS = ("Tensor", "ndarray")
# What a number counts or is measured in; a formula, a range, or where it is described.
UNIT = re.compile(
    r"\b(seconds?|minutes|bytes|bits|nats?|FLOPs?|tokens?|characters|steps|checkpoints|rows|streams|layers|heads|"
    r"experts|parameters|normalizations|windows|blocks?|documents|questions|examples|messages?|number of|how many|"
    r"how often|size|length|width|numbers|rank|index|seed|share|fraction|ratio|probability|factor|between 0 and 1|loss|"
    r"rate|temperature)\b|as in `|`[^`]*[*(][^`]*`",
    flags=re.IGNORECASE,
)


def public(package):
    return [f"{package}.{name}" for name in importlib.import_module(package).__all__ if not name.startswith("__")]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(package):
    assert set(public(package)) <= set(SHOWN)


def test_every_member_of_a_wrapped_model_is_in_the_reference():
    config = Qwen2Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=16,
        eos_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    before = set(vars(model))
    added = {name for name in vars(wrap(model, 2, prefix_length=2, init="random")).keys() - before if name[0] != "_"}
    page = (REFERENCE / "model.md").read_text()
    listed = {path.rpartition(".")[2] for path in re.findall(r"^::: (\S+)$", page, flags=re.M)}
    listed |= set(re.findall(r"^`model\.(\w+)`$", page, flags=re.M))
    assert {"add_streams", "use_streams"} <= added
    assert added | {"num_streams"} <= listed


@pytest.mark.parametrize("path", SHOWN)
def test_what_the_reference_shows_is_there(path):
    assert pydoc.locate(path) is not None


def callables():
    """Each function, class and public method that the reference shows, by its name there."""
    for path in SHOWN:
        found = pydoc.locate(path)
        if inspect.isfunction(found):
            yield path, found
        elif inspect.isclass(found):
            yield path, found
            for name, member in vars(found).items():
                function = inspect.unwrap(getattr(member, "__func__", member))
                if name[0] != "_" and inspect.isfunction(function):
                    yield f"{path}.{name}", function


def sections(docstring):
    """The text of each section by its name, and under "" what stands in front."""
    parts = SECTION.split(inspect.cleandoc(docstring or ""))
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def entries(section):
    """The descriptions in a section by the names that they are for; `a, b: ...` is for both."""
    found = {}
    for entry in re.split(r"\n(?=    \S)", "\n" + section.strip("\n")):
        names, colon, text = entry.strip().partition(":")
        if colon:
            found |= dict.fromkeys((name.strip(" *`") for name in names.split(",")), text)
    return found


def test_fields_are_described_as_attributes():
    """Of all dataclasses and named tuples, also those that are not public."""
    folders = [REFERENCE.parents[1] / name for name in ("parscale", "kernels", "checkpoints", "scaling_laws")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for folder in folders for path in folder.rglob("*.py")]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    made_of = {node: " ".join(map(ast.unparse, (*node.decorator_list, *node.bases))) for node in classes}
    with_fields = [node for node, words in made_of.items() if re.search(r"\b(dataclass|NamedTuple)\b", words)]
    assert len(with_fields) > 50
    assert [node.name for node in with_fields if "Args" in sections(ast.get_docstring(node))] == []


def tree(found):
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(found))).body
    return node


def field_docstrings(found):
    """What stands as a string below a field, as the builder reads it."""
    body = tree(found).body
    return {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def parameters(found):
    """Each parameter that a caller gives, with its annotation."""
    if dataclasses.is_dataclass(found):
        return {field.name: str(field.type) for field in dataclasses.fields(found)}
    names = inspect.signature(found).parameters.values()
    return {item.name: str(item.annotation) for item in names if item.name not in ("self", "cls")}


def raises(function):
    """Whether its own body raises."""
    return any(isinstance(node, ast.Raise) for node in ast.walk(tree(function)))


@pytest.mark.parametrize(("path", "found"), callables())
def test_its_docstring_is_complete(path, found):
    parts = sections(found.__doc__)
    assert parts[""].strip(), f"{path} does not say what it is"
    if inspect.isclass(found) and not dataclasses.is_dataclass(found):
        return  # an exception, a named tuple or a list's name
    described = entries(parts.get("Args", "")) | entries(parts.get("Attributes", ""))
    if inspect.isclass(found):
        described |= field_docstrings(found)
    given = parameters(found)
    if path.startswith(("parscale.methods.", "parscale.streams.")):
        given.pop("model", None)  # which the member is of
    assert set(given) <= set(described), f"{path} does not describe {sorted(set(given) - set(described))}"
    for name, annotation in given.items():
        if any(kind in annotation for kind in ARRAYS):
            assert re.search(r"`\([^`]*\)`", described[name]), f"{path} does not say the shape of {name}"
        if re.search(r"\b(int|float)\b", annotation):
            words = f"{name.replace('_', ' ')}: {described[name]}"
            assert UNIT.search(words), f"{path} does not say what the number {name} counts or is measured in"
    if inspect.isfunction(found):
        result = str(inspect.signature(found).return_annotation)
        if given and result not in ("None", "<class 'inspect._empty'>"):  # of no arguments, the first line says it
            assert {"Returns", "Yields"} & set(parts), f"{path} does not say what it returns"
        if raises(found):
            assert "Raises" in parts, f"{path} does not say what it raises"
