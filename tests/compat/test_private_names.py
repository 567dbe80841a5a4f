"""Names of other libraries that begin with an underscore, or that nobody documents, stand in `compat` alone."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPAT = (ROOT / "parscale" / "compat", ROOT / "kernels" / "compat.py")
ROOMS = ("parscale", "kernels", "checkpoints", "scaling_laws")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
OUTSIDE = [path for path in FILES if not any(map(path.is_relative_to, COMPAT))]
PRIVATE = re.compile(r"_[A-Za-z]\w*(?<!__)")

# Of libraries that have a compat module: modules with a page in their documentation, beside the package itself.
LIBRARIES = ("accelerate", "bitsandbytes", "deepspeed", "huggingface_hub", "peft", "transformers", "trl", "vllm")
DOCUMENTED = {
    "accelerate.utils",
    "huggingface_hub.errors",
    "huggingface_hub.utils",
    "transformers.models.auto.modeling_auto",  # MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, in the guide to auto classes
    "transformers.utils",
    "transformers.utils.generic",  # ModelOutput, documented as transformers.utils.ModelOutput
}
PUBLIC = {"_fields"}  # of named tuples
# What generate and the auto classes call on a class of ours, which derives from none of theirs.
CALLED_ON_OURS = {"_from_config"}
# Our own words that begin with an underscore: endings and joints of names.
WORDS = {
    *("_at_smaller_", "_config", "_features", "_float16", "_from_", "_limit", "_loss", "_nats_per_token", "_parscale"),
    "_stderr",
}


def own_members(paths):
    """Names with an underscore that classes of these files define."""
    found = set(CALLED_ON_OURS)
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                functions = (each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
                found.update(each.name for each in functions)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                found.add(node.attr)
    return found


def is_self(node):
    return isinstance(node, ast.Name) and node.id == "self"


OURS = own_members(OUTSIDE)


def foreign_names(tree, own=OURS):
    """Names in a source that are another library's own business, with the line of each."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr) and node.attr not in own | PUBLIC:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if PRIVATE.fullmatch(node.value) and node.value not in WORDS:
                yield node.lineno, repr(node.value)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, name) for name in imported(node) if is_internal(name))


def imported(node):
    """The modules, and the names in them, that an import statement asks for."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [] if node.level or node.module is None else [f"{node.module}:{alias.name}" for alias in node.names]


def is_internal(name):
    module, _, value = name.partition(":")
    parts = [*module.split("."), value]
    if parts[0] in ("parscale", "__future__"):
        return False
    if any(PRIVATE.fullmatch(part) for part in parts):
        return True
    return parts[0] in LIBRARIES and "." in module and module not in DOCUMENTED


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_private_name_outside_compat(path):
    found = sorted(set(foreign_names(ast.parse(path.read_text()))))
    assert not found, f"{path.relative_to(ROOT)} leans on private names: give each a function in parscale/compat"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("module._parameters", "_parameters"),
        ("getattr(config, '_attn_implementation', None)", "'_attn_implementation'"),
        ("from torch._subclasses import fake_tensor", "torch._subclasses:fake_tensor"),
        ("from torch import _C", "torch:_C"),
        ("import bitsandbytes.nn.modules", "bitsandbytes.nn.modules"),
        ("def f():\n    from vllm.v1.outputs import LogprobsTensors", "vllm.v1.outputs:LogprobsTensors"),
    ],
)
def test_a_private_name_is_found(source, name):
    assert [found for _, found in foreign_names(ast.parse(source))] == [name]


@pytest.mark.parametrize("source", ["self.__dict__", "self._record()", "from transformers import Trainer", "'_loss'"])
def test_names_of_ours_and_documented_ones_are_left_alone(source):
    assert not list(foreign_names(ast.parse(source)))
