"""Folders made to hang, to fill the memory or to compute nonsense: refused in one sentence, at once."""

import json
import os
import shutil
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers
from small_models import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from parscale import load, wrap
from parscale.checkpoints.description import describe
from parscale.checkpoints.models import load_plain
from parscale.format.folders import read_json
from parscale.format.headers import read_header
from parscale.format.values import check_values

SECONDS = 5.0
CONFIGS = {"full": "config.json", "streams": "parscale_config.json", "plain": "config.json"}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("originals")
    tiny_llama().save_pretrained(root / "plain")
    model = wrap(LlamaForCausalLM.from_pretrained(root / "plain"), 2, prefix_length=3, init="random")
    model.add_streams("code", 4, prefix_length=2, init="random")
    model.save_pretrained(root / "full")
    model.save_streams(root / "streams")
    return root


@pytest.fixture
def copied(originals, tmp_path):
    return lambda kind: Path(shutil.copytree(originals / kind, tmp_path / kind))


def read(folder):
    return load_plain(str(folder)) if folder.name == "plain" else load(folder)


def refused(action, match):
    """With an error of the documented kinds, in a sentence, at once."""
    start = time.process_time()
    with pytest.raises((ValueError, OSError), match=match) as caught:
        action()
    assert time.process_time() - start < SECONDS
    assert len(str(caught.value)) < 2000


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- headers and JSON


def header(path, text):
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    return path


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
LONG = 10**3999  # an integer of 4,000 digits, which Python reads
HEADERS = {
    "a long number": {"a": ENTRY | {"shape": [LONG]}},
    "many long numbers": {"a": ENTRY | {"shape": [LONG] * 250}},
    "long numbers in many tensors": {str(i): ENTRY | {"shape": [LONG]} for i in range(250)},
    "a long offset": {"a": ENTRY | {"data_offsets": [0, LONG]}},
    "many sizes": {"a": ENTRY | {"shape": [2**40] * 80_000}},
    "many sizes of an unknown kind": {"a": ENTRY | {"shape": [2**40] * 80_000, "dtype": "F5"}},
    "nested": {"a": json.loads("[" * 500 + "]" * 500)},
    "deeply nested": b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "half a character in a name": b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    "half a character in a dtype": b'{"a": {"dtype": "\\uDfff", "shape": [1], "data_offsets": [0, 4]}}',
    "a long name": {"a" * 10**6: ENTRY | {"shape": [2]}},
    "a name twice": b"{" + b",".join([b'"a": 1'] * 100_000) + b"}",
}


@pytest.mark.parametrize("contents", HEADERS.values(), ids=HEADERS)
def test_a_header(tmp_path, contents):
    refused(lambda: read_header(header(tmp_path / "a.safetensors", contents)), "header|sound safetensors")


def test_a_header_longer_than_any_model_needs(tmp_path):
    refused(
        lambda: read_header(header(tmp_path / "a.safetensors", b"{}" + b" " * 17 * 2**20)), "at most 16777216 are read"
    )


def test_a_header_of_fifty_thousand_tensors_is_read(tmp_path):
    contents = {
        f"model.layers.{i}.experts.down_proj": {"dtype": "F32", "shape": [0, 7], "data_offsets": [0, 0]}
        for i in range(50_000)
    }
    path = header(tmp_path / "a.safetensors", contents)
    path.write_bytes(path.read_bytes()[:-4])
    start = time.process_time()
    assert len(read_header(path)) == 50_000
    assert time.process_time() - start < SECONDS


JSON = {
    "a long number": '{"a": %s}' % LONG,  # noqa: UP031
    "nested lists": '{"a": ' + "[" * 70 + "]" * 70 + "}",
    "nested objects": '{"a": ' * 70 + "1" + "}" * 70,
    "deeply nested": "[" * 10**6,
    "half a character": '{"\\ud83d": 1}',
    "half a character, deep": '{"a": [{"b": "\\uDE00"}]}',
}


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
@pytest.mark.parametrize("kind", ["full", "streams", "plain"])
def test_a_configuration_that_json_allows(copied, kind, text):
    folder = copied(kind)
    (folder / CONFIGS[kind]).write_text(text)
    refused(lambda: read(folder), "is not JSON")
    refused(lambda: describe(str(folder)), "is not JSON")


def test_a_whole_character_from_two_halves_is_text(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "a.json") == {"a": "\N{GRINNING FACE}"}


def test_a_configuration_of_many_megabytes(copied):
    folder = copied("full")
    edit(folder / "config.json", extra="x" * 17 * 2**20)
    refused(lambda: load(folder), "at most 16777216 are read")


def test_an_index_may_be_longer_than_a_configuration(copied):
    """Of hundreds of thousands of tensors."""
    folder = copied("plain")
    model = load_plain(str(folder))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="4KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text() + " " * 17 * 2**20)
    found = load_plain(str(folder)).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


# -- numbers


NUMBERS = {
    "layers": {"num_hidden_layers": 10**9},
    "labels": {"num_labels": 10**7},
    "classes": {"num_classes": 10**7},
    "depths": {"depths": [1, 10**9]},
    "layers in a part": {"text_config": {"num_hidden_layers": 10**9}},
    "prediction layers": {"num_nextn_predict_layers": 10**9},
    "repeats": {"num_block_repeats": [1, 10**9]},
    "not a number": {"rms_norm_eps": float("nan")},
    "infinity": {"rms_norm_eps": float("inf")},
    "more than a float holds": {"rms_norm_eps": "1e999"},
    "as transformers writes it": {"rms_norm_eps": {"__float__": "NaN"}},
    "a negative epsilon": {"rms_norm_eps": -1e-6},
    "a large epsilon": {"rms_norm_eps": 1e300},
    "not a number, elsewhere": {"initializer_range": float("nan")},
    "infinity in a part": {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}},
    "not a number in a list": {"extra": [[float("nan")]]},
    "negative layers": {"num_hidden_layers": -1},
    "negative heads": {"num_attention_heads": -2},
    "a negative size": {"hidden_size": -16},
    "negative positions": {"max_position_embeddings": -1},
}


@pytest.mark.parametrize("changes", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("kind", ["full", "plain", "backbone of streams", "full by Auto"])
def test_a_number_that_no_model_has(copied, kind, changes):
    folder = copied("plain" if kind in ("plain", "backbone of streams") else "full")
    edit(folder / "config.json", **changes)
    text = (folder / "config.json").read_text().replace('"1e999"', "1e999")
    (folder / "config.json").write_text(text)
    if kind == "backbone of streams":
        streams = copied("streams")
        refused(lambda: load(streams, backbone=folder), f"says {field(changes)} = ")
    elif kind == "full by Auto":
        refused(lambda: AutoModelForCausalLM.from_pretrained(folder), f"says {field(changes)} = |config.json")
    else:
        refused(lambda: read(folder), f"says {field(changes)} = ")


def field(changes):
    """The field, or the part of it, that is complained of."""
    (name, value), *_ = changes.items()
    inner = [key for key in value if not key.startswith("__")] if isinstance(value, dict) else []
    return inner[-1] if inner else name


def test_numbers_that_some_models_have():
    """Of mamba, of vision models, of classifiers with many classes."""
    sound = {
        "time_step_limit": [0.0, float("inf")],
        "vision_feature_layer": -2,
        "num_images": -1,
        "chunk_size": -1,
        "pad_token_id": -1,
        "num_labels": 21_841,
        "layer_norm_eps": 0.0,
        "vocab_size_per_layer_input": 262_144,
        "timesteps": 1000,
        "id2label": dict.fromkeys(range(1000), "x"),
    }
    check_values("a checkpoint", sound, None)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("SwinConfig", {"depths": [1, 900, 1000, 1000]}),
        ("ConvNextConfig", {"depths": [1000] * 40, "hidden_sizes": [8] * 40}),
        ("BertConfig", {"num_hidden_layers": 1000, "hidden_size": 12}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_of_far_more_modules_than_the_files_hold(tmp_path, name, changes):
    """Each number by itself is one that a model may have."""
    cls = getattr(transformers, name.replace("Config", "Model"))
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "intermediate_size": 12} if name == "BertConfig" else {}
    config = getattr(transformers, name)(**sizes)
    folder = tmp_path / "plain"
    if name == "BertConfig":
        cls(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
        edit(folder / "config.json", architectures=[cls.__name__])
        header(folder / "model.safetensors", {"a": ENTRY})
    edit(folder / "config.json", **changes)
    refused(lambda: load_plain(str(folder), any_task=True), "describes? (more than|a model of)")


def test_a_model_of_far_more_numbers_than_the_files_hold(copied):
    """Of as many modules as the files hold, and refused before memory for them is asked for."""
    folder = copied("plain")
    edit(folder / "config.json", intermediate_size=2**20)
    refused(lambda: load_plain(str(folder)), "describes a model of [0-9]+ numbers, but its files hold")


def test_what_another_thread_builds_meanwhile_is_not_counted(copied, at_once, monkeypatch):
    """While the model that a configuration describes is built, to be counted."""
    folder, begun, built = copied("plain"), threading.Event(), threading.Event()
    init = LlamaForCausalLM.__init__

    def slow(self, *args, **kwargs):
        begun.set()
        assert built.wait(60)
        init(self, *args, **kwargs)

    def build():
        assert begun.wait(60)
        try:
            nn.ModuleList(nn.Identity() for _ in range(10_000))
        finally:
            built.set()

    monkeypatch.setattr(LlamaForCausalLM, "__init__", slow)
    model, _ = at_once(lambda: load_plain(str(folder)), build)
    assert isinstance(model, LlamaForCausalLM)


# -- what is no file


def special(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            socket.socket(socket.AF_UNIX).bind(path.name)
        finally:
            os.chdir(here)


FILES = {
    "full": ["config.json", "model.safetensors", "generation_config.json", "code/streams.safetensors"],
    "streams": ["parscale_config.json", "streams.safetensors"],
    "plain": ["config.json", "model.safetensors", "generation_config.json", "adapter_config.json"],
}


@pytest.mark.parametrize("special_kind", ["pipe", "device", "socket"])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FILES.items() for name in names])
def test_what_is_no_file_is_not_opened(copied, kind, name, special_kind):
    folder = copied(kind)
    (folder / name).unlink(missing_ok=True)
    special(folder / name, special_kind)
    refused(lambda: read(folder), "is a (named pipe|device|socket), which is not opened")


# -- names of sets


@pytest.mark.parametrize(
    "names", [["../elsewhere"], ["code", "code"], [None], [5], [["code"]], "code", None, {}, [""], ["off"]]
)
def test_info_and_saving_take_names_of_sets_as_load_does(copied, tmp_path, names):
    folder = copied("full")
    edit(folder / "config.json", parscale_sets=names)
    for action in (lambda: describe(str(folder)), lambda: load(folder)):
        refused(action, "should name sets of streams|names a set of streams twice")
    shutil.copytree(folder / "code", tmp_path / "elsewhere")
    wrap(tiny_llama(), 2, prefix_length=3, init="random").save_pretrained(folder)
    assert load(folder).num_streams == 2
    assert (tmp_path / "elsewhere" / "streams.safetensors").exists()


@pytest.mark.parametrize("name", [None, 5, "", "../a", "a\x1b[31m", ["default"], "off"])
def test_info_takes_the_name_of_streams_as_load_does(copied, name):
    folder = copied("streams")
    edit(folder / "parscale_config.json", name=name)
    for action in (lambda: describe(str(folder)), lambda: load(folder)):
        refused(action, "should name a set of streams")


@pytest.mark.parametrize(
    ("options", "field", "said"),
    [
        ({"transform": "prompt", "prefix_length": 3}, "parscale_n_tokens", r"prompt of .*says \(2, 10+, hidden size\)"),
        ({"transform": "lora", "rank": 2}, "parscale_rank", r"stream_down of .*says \(2, 10+, inputs\)"),
    ],
    ids=["prompt", "lora"],
)
def test_absurd_sizes_are_refused_before_memory_is_asked_for(options, field, said, tiny, tmp_path):
    wrap(tiny(), 2, init="random", **options).save_streams(tmp_path)
    path = tmp_path / "parscale_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: 10**12}))
    with pytest.raises(ValueError, match=said):
        load(tmp_path, backbone=tiny())
