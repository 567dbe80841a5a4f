"""A checkpoint with any part of it changed is read, or refused with an error of the documented kinds."""

import contextlib
import json
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from parscale import load, wrap


def backbone():
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A full checkpoint, and its streams alone."""
    root = tmp_path_factory.mktemp("originals")
    model = wrap(backbone(), 2, prefix_length=3, init="random")
    model.add_streams("code", 4, prefix_length=2, init="random")
    model.save_pretrained(root / "full")
    model.save_streams(root / "streams")
    return root


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


ANYTHING = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def survives(folder, **options):
    """It is read, or refused with an error of the documented kinds."""
    with contextlib.suppress(ValueError, OSError):
        load(folder, **options)


@ANYTHING
@given(st.data())
def test_any_truncation_and_any_changed_byte_of_the_header(originals, scratch, data):
    folder = scratch / "bytes"
    shutil.copytree(originals / "full", folder, dirs_exist_ok=True)
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


JSON_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from(
        [10**6, 10**12, -(10**12), 0.5, -1.0, 1e300, "", "eager", "float16", "text", [], {}, [1], {"a": 1}]
    ),
)


UNUSUAL = ["attn_implementation", "quantization_config", "sub_configs", "text_config", "tie_word_embeddings", "extra"]


@ANYTHING
@given(st.data())
def test_any_value_of_any_field(originals, scratch, data):
    kind = data.draw(st.sampled_from(["full", "streams"]))
    folder = scratch / f"fields-{kind}"
    shutil.copytree(originals / kind, folder, dirs_exist_ok=True)
    name = "config.json" if kind == "full" else "parscale_config.json"
    fields = json.loads((originals / kind / name).read_text())
    key = data.draw(st.sampled_from(sorted(fields) + UNUSUAL))
    fields[key] = data.draw(JSON_VALUES)
    (folder / name).write_text(json.dumps(fields))
    survives(folder, **({} if kind == "full" else {"backbone": backbone()}))
