"""Each architecture is run, and an argument of a kind that no table knows is reported.

A new one is added to the table of `parscale/compat/arguments.py` that says what it holds.
"""

import contextlib
import inspect
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from scripts import load_script

from parscale.compat import arguments as tables
from parscale.errors import UnsupportedModelError
from parscale.streams.backbones import find_parts

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RECORDED = json.loads((BENCHMARKS / "results" / "support.json").read_text())["classes"]
FORMS = 4  # of inputs that are tried with a model
# Of a backbone's own arguments, those that need no table: settings, and tensors with one row for each sequence.
SETTINGS = {
    *("interpolate_pos_encoding", "num_hashes", "output_attentions", "output_hidden_states", "return_dict"),
    *("use_cache", "use_mems"),
}
BY_ROW = {
    *("audio_attention_mask", "audio_embed_sizes", "audio_input_features", "image_attention_mask"),
    *("image_pixel_values", "image_sizes", "input_mask", "lang_ids", "lengths", "patch_lengths", "perm_mask"),
    "target_mapping",
}
IN_TABLES = {
    *(*tables.INPUTS, *tables.ENCODED, *tables.NOT_COPIED, *tables.ANY_ROWS, *tables.PER_TOKEN, *tables.IMAGE_MASKS),
    *(*tables.LAYER_MASKS, tables.POSITIONS, tables.NOISE),
}
# Of tokens, and with a way of their own into a pass with a prompt.
BY_TOKEN = {*tables.INPUTS, *tables.PER_TOKEN, *tables.LAYER_MASKS, tables.POSITIONS}
# Without one row for each sequence.
BY_NO_ROW = {*tables.NOT_COPIED, *tables.ANY_ROWS, tables.POSITIONS}


tiny_models, tiny_inputs = map(load_script, ("tiny_models", "tiny_inputs"))
ROWS, TOKENS = tiny_inputs.ROWS, tiny_inputs.TOKENS


def parts_of(model):
    """The backbone of a model, and what else gets a row for each stream."""
    parts = find_parts(model)
    return [part for part in (parts.backbone, parts.encoder, *parts.towers) if part is not None]


def named(part):
    """The arguments that a part's signature names."""
    parameters = inspect.signature(part.forward).parameters.values()
    return {each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}


@torch.no_grad()
def given(model):
    """The tensors that reach these parts, by name, in whatever forms the model takes."""
    found = {}

    def record(module, args, kwargs):
        names = list(inspect.signature(module.forward).parameters)
        for name, value in (dict(zip(names, args, strict=False)) | kwargs).items():
            if isinstance(value, torch.Tensor) and value.ndim:
                found.setdefault(name, set()).add((tuple(value.shape), rows_of(forms[-1])))

    forms = []
    for part in parts_of(model):
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


def is_built(name):
    """Whether a class can be made here, as the table of architectures has it; one that it does not know is tried."""
    return RECORDED.get(name, {}).get("prefix", {}).get("verdict") != "cannot be built"


@pytest.mark.slow
@pytest.mark.parametrize("name", list(filter(is_built, tiny_models.names())))
def test_every_argument_is_known(name):
    model = tiny_models.Tiny(name).build()
    with contextlib.suppress(UnsupportedModelError):  # without a backbone there are no arguments of it
        new = set().union(*map(named, parts_of(model))) - IN_TABLES - BY_ROW - SETTINGS
        assert not new, "say what it holds, in a table of parscale/compat/arguments.py or here"
        assert not list(unknown(given(model))), "add it to a table of parscale/compat/arguments.py"


@pytest.mark.parametrize("name", tables.CACHES)
def test_a_cache_is_found_under_each_of_its_names(name):
    cache, others = object(), dict.fromkeys(tables.CACHES)
    assert tables.given_cache({"input_ids": 1, name: cache}) is cache
    assert tables.given_cache(others | {name: cache}) is cache
    assert tables.given_cache(others) is tables.given_cache({"input_ids": 1}) is None
    empty = []  # as a cache that holds nothing yet
    assert tables.given_cache(others | {name: empty}) is empty


def test_an_argument_in_a_signature_is_named():
    class Part:
        def forward(self, input_ids, shades=None, *args, use_cache=True, **kwargs):
            """Takes one that is new."""

    assert named(Part()) - IN_TABLES - BY_ROW - SETTINGS == {"shades"}


def test_a_new_argument_is_reported():
    new = {"shades": {((ROWS, TOKENS), ROWS)}, "patches": {((5, 3), ROWS)}, "input_ids": {((ROWS, TOKENS), ROWS)}}
    assert list(unknown(new)) == [
        f"shades {(ROWS, TOKENS)}: one entry for each token",
        f"patches (5, 3): neither {ROWS} rows nor one",
    ]
