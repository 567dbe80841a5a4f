"""Each architecture is run, and an argument of a kind that no table knows is reported.

A new one is added to the table of ``parscale/compat/arguments.py`` that says what it holds.
"""

import importlib.util
import inspect
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from parscale.compat import arguments as tables
from parscale.errors import UnsupportedModelError
from parscale.streams.backbones import find_parts

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FORMS = 16  # of inputs that are tried with a model
# Of tokens, and with a way of their own into a pass with a prompt.
BY_TOKEN = {*tables.INPUTS, *tables.TOKENS, *tables.LAYER_MASKS, tables.POSITIONS}
# Without one row for each sequence.
BY_NO_ROW = {*tables.WHOLE, *tables.PACKED, tables.POSITIONS}


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_models, tiny_inputs = map(load_script, ("tiny_models", "tiny_inputs"))
ROWS, TOKENS = tiny_inputs.ROWS, tiny_inputs.TOKENS


@torch.no_grad()
def given(model):
    """The tensors that reach the backbone of a model and its encoder, by name, in whatever forms it takes."""
    parts = find_parts(model)
    found = {}

    def record(module, args, kwargs):
        names = list(inspect.signature(module.forward).parameters)
        for name, value in (dict(zip(names, args, strict=False)) | kwargs).items():
            if isinstance(value, torch.Tensor) and value.ndim:
                found.setdefault(name, set()).add((tuple(value.shape), rows_of(forms[-1])))

    forms = []
    for part in (parts.backbone, parts.encoder, *parts.towers):
        if part is not None:
            part.register_forward_pre_hook(record, with_kwargs=True)
    for form in islice(tiny_inputs.candidates(model.eval()), FORMS):
        forms.append(form)
        try:
            model(**form)
        except Exception:  # not an input that it takes
            continue
    return found


def rows_of(form):
    return next(iter(form.values())).shape[0]


def unknown(found):
    """What no table knows: an entry for each token, or neither as many rows as the input nor one."""
    for name, shapes in found.items():
        for shape, rows in shapes:
            if shape[:2] == (rows, TOKENS) and name not in BY_TOKEN and name not in tables.ENCODED:
                yield f"{name} {shape}: one entry for each token"
            if shape[0] not in (1, rows) and name not in BY_NO_ROW:
                yield f"{name} {shape}: neither {rows} rows nor one"


@pytest.mark.parametrize("name", tiny_models.names())
def test_every_argument_is_known(name):
    try:
        found = given(tiny_models.Tiny(name).build())
    except UnsupportedModelError:
        pytest.skip("has no backbone that streams run on")
    assert not list(unknown(found)), "add it to a table of parscale/compat/arguments.py"


def test_a_new_argument_is_reported():
    new = {"shades": {((ROWS, TOKENS), ROWS)}, "patches": {((5, 3), ROWS)}, "input_ids": {((ROWS, TOKENS), ROWS)}}
    assert list(unknown(new)) == [
        f"shades {(ROWS, TOKENS)}: one entry for each token",
        f"patches (5, 3): neither {ROWS} rows nor one",
    ]
