"""A checkpoint with any part of it changed is read, or refused with an error of the documented kinds."""

import json
import os
import shutil
import struct
import time
import traceback
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_models import tiny_llama
from transformers import AutoModelForCausalLM

import parscale
from parscale import load, wrap
from parscale.checkpoints.description import describe
from parscale.checkpoints.models import load_plain


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A full checkpoint, the same in shards, its streams alone, and a plain backbone."""
    root = tmp_path_factory.mktemp("originals")
    model = wrap(tiny_llama(), 2, prefix_length=3, init="random")
    model.add_streams("code", 4, prefix_length=2, init="random")
    model.save_pretrained(root / "full")
    model.save_pretrained(root / "shards", max_shard_size="10KB")
    model.save_streams(root / "streams")
    tiny_llama().save_pretrained(root / "plain")
    return root


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


ANYTHING = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
SOME = settings(ANYTHING, max_examples=30)
SECONDS = 5.0


def by_transformers(folder):
    """As its users call it; an error before transformers has come to parscale is its own."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder)
    except (TypeError, AttributeError) as error:
        package = Path(parscale.__file__).parent
        if any(package in Path(frame.filename).parents for frame in traceback.extract_tb(error.__traceback__)):
            raise
        raise ValueError(f"transformers: {error}") from error


READERS = {
    "full": [load, by_transformers, lambda folder: describe(str(folder))],
    "shards": [load, lambda folder: describe(str(folder))],
    "streams": [lambda folder: load(folder, backbone=tiny_llama()), load, lambda folder: describe(str(folder))],
    "plain": [lambda folder: load_plain(str(folder)), lambda folder: describe(str(folder))],
}
CONFIGS = {"full": "config.json", "shards": "config.json", "streams": "parscale_config.json", "plain": "config.json"}


def survives(folder, read=load):
    """It is read, or refused with an error of the documented kinds that says something, soon; nothing is written."""
    before, start = files(folder.parent), time.process_time()
    error = refusal(read, folder)
    assert error is None or (str(error).strip() and len(str(error)) < 10_000)
    assert time.process_time() - start < SECONDS
    assert files(folder.parent) == before


def refusal(read, folder):
    """The error; `None` if it is read."""
    try:
        read(folder)
    except (ValueError, OSError) as error:
        return error
    return None


def files(folder):
    return {(path, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def fresh(originals, scratch, kind):
    """One of the originals, copied anew."""
    shutil.rmtree(scratch / kind, ignore_errors=True)
    return shutil.copytree(originals / kind, scratch / kind)


@ANYTHING
@given(st.data())
def test_any_truncation_and_any_changed_byte_of_the_header(originals, scratch, data):
    folder = fresh(originals, scratch, "full")
    path = folder / "model.safetensors"
    contents = bytearray((originals / "full" / "model.safetensors").read_bytes())
    length = 8 + struct.unpack("<Q", contents[:8])[0]
    if data.draw(st.booleans()):
        kept = data.draw(st.integers(0, len(contents) - 1))
        path.write_bytes(contents[:kept])
        with pytest.raises((ValueError, OSError)):
            load(folder)
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            contents[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(contents)
        survives(folder)


NUMBERS = [10**6, 10**9, 10**12, -(10**12), 10**400, 0.5, -1.0, 1e300, float("nan"), float("inf"), -float("inf")]
TEXTS = [
    "",
    "eager",
    "float16",
    "text",
    "../elsewhere",
    "a\x1b[31m\u202e",
    "x" * 3000,
    "[red]",
    "a\0b",
    "default",
    "NaN",
]
LISTS = [[], [1], [1, 10**9], [[[]]], ["code", "code"], [None], ["../x"], [10**9] * 3]
DICTS = [{}, {"a": 1}, {"__float__": "NaN"}, {"0": "a"}, {"AutoConfig": "code.Config"}, {"num_hidden_layers": 10**9}]
DICTS += [{"quant_method": name, "bits": 4} for name in ("gptq", "awq", "bitsandbytes", "none", "fp8", "torchao")]
JSON_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([*NUMBERS, *TEXTS, *LISTS, *DICTS]),
    st.recursive(st.integers(-1, 5) | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)),
)


UNUSUAL = ["attn_implementation", "quantization_config", "sub_configs", "text_config", "tie_word_embeddings", "extra"]
UNUSUAL += ["num_labels", "id2label", "label2id", "depths", "layer_types", "auto_map", "torch_dtype", "architectures"]
UNUSUAL += ["_attn_implementation", "_name_or_path", "transformers_weights", "pruned_heads", "is_encoder_decoder"]
UNUSUAL += ["parscale_sets", "parscale_name", "parscale_transform", "parscale_rank", "backbone_path", "name"]
UNUSUAL += ["num_nextn_predict_layers", "problem_type", "experts_implementation", "base_model_tp_plan", "generation"]


@ANYTHING
@given(st.data())
def test_any_value_of_any_field(originals, scratch, data):
    kind = data.draw(st.sampled_from(sorted(READERS)))
    folder = fresh(originals, scratch, kind)
    path = folder / CONFIGS[kind]
    fields = json.loads(path.read_text())
    for key in data.draw(st.lists(st.sampled_from(sorted(fields) + UNUSUAL), min_size=1, max_size=2)):
        fields[key] = data.draw(JSON_VALUES)
    path.write_text(json.dumps(fields))
    survives(folder, data.draw(st.sampled_from(READERS[kind])))


@SOME
@given(st.data())
def test_any_text_for_a_json_file(originals, scratch, data):
    kind = data.draw(st.sampled_from(sorted(READERS)))
    folder = fresh(originals, scratch, kind)
    name = data.draw(st.sampled_from(sorted(path.name for path in folder.glob("*.json"))))
    contents = (folder / name).read_text()
    place = data.draw(st.integers(0, len(contents)))
    kept = contents[data.draw(st.integers(place, min(len(contents), place + 20))) :]
    pieces = [
        "",
        "[" * 90,
        "{" * 90,
        "9" * 5000,
        "1" * 30,
        '"\\ud800"',
        "NaN",
        "-Infinity",
        "1e999",
        "\0",
        ",",
        '"a":',
        "null",
    ]
    (folder / name).write_text(contents[:place] + data.draw(st.sampled_from(pieces)) + kept)
    survives(folder, data.draw(st.sampled_from(READERS[kind])))


NAMES = st.one_of(
    st.sampled_from(
        ["model.norm.weight", "model.layers.0.self_attn.prefix_k", "model.aggregate_layer.0.bias", "a\x1b[31m"]
    ),
    st.text(st.characters(), max_size=8),
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "I64", "U8", "F8_E4M3", "F4", "X", "", None, 5]),
        "shape": st.lists(st.sampled_from([0, 1, 2, 16, 2**40, 10**25, -1, 1.5, None]), max_size=5)
        | st.just([2] * 5000),
        "data_offsets": st.lists(st.sampled_from([0, 4, 64, 2**60, 10**30, -4, "0", 0.5]), max_size=3),
        "extra": st.integers(),
    },
)


@SOME
@given(st.data())
def test_any_header(originals, scratch, data):
    kind = data.draw(st.sampled_from(sorted(READERS)))
    folder = fresh(originals, scratch, kind)
    path = data.draw(st.sampled_from(sorted(folder.rglob("*.safetensors"))))
    contents = path.read_bytes()
    length = struct.unpack("<Q", contents[:8])[0]
    header = json.loads(contents[8 : 8 + length])
    kept = data.draw(st.lists(st.sampled_from(sorted(header)), max_size=3)) if data.draw(st.booleans()) else header
    changed = {name: header[name] for name in kept}
    changed |= data.draw(st.dictionaries(NAMES, ENTRIES | JSON_VALUES, max_size=3))
    text = json.dumps(changed).encode()
    claimed = data.draw(st.sampled_from([len(text)] * 5 + [0, len(text) - 1, len(text) + 1, 2**63, 2**64 - 1]))
    path.write_bytes(struct.pack("<Q", claimed) + text + contents[8 + length :])
    survives(folder, data.draw(st.sampled_from(READERS[kind])))


@SOME
@given(st.data())
def test_any_index_of_shards(originals, scratch, data):
    folder = fresh(originals, scratch, "shards")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = [
        *sorted(set(index["weight_map"].values())),
        "../full/model.safetensors",
        "/dev/zero",
        "config.json",
        "",
        None,
    ]
    for name in data.draw(st.lists(NAMES | st.sampled_from(sorted(index["weight_map"])), max_size=3)):
        index["weight_map"][name] = data.draw(st.sampled_from(shards))
    if data.draw(st.booleans()):
        index[data.draw(st.sampled_from(["metadata", "weight_map", "extra"]))] = data.draw(JSON_VALUES)
    path.write_text(json.dumps(index))
    survives(folder, data.draw(st.sampled_from(READERS["shards"])))


@SOME
@given(st.data())
def test_any_file_that_is_missing_or_something_else(originals, scratch, data):
    kind = data.draw(st.sampled_from(sorted(READERS)))
    folder = fresh(originals, scratch, kind)
    path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    path.unlink()
    other = data.draw(st.sampled_from(["nothing", "empty", "folder", "pipe", "loop", "noise"]))
    if other in ("empty", "noise"):
        path.write_bytes(b"" if other == "empty" else data.draw(st.binary(min_size=1, max_size=40)))
    elif other == "folder":
        path.mkdir()
    elif other == "pipe":
        os.mkfifo(path)
    elif other == "loop":
        path.symlink_to(path)
    survives(folder, data.draw(st.sampled_from(READERS[kind])))
