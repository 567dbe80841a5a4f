"""Folders that commit 39580f7 wrote, of each kind, give what they gave there; `tests/data` has them and the program."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM

import parscale

OLD = Path(__file__).parents[2] / "data" / "written_by_39580f7"
FULL = {
    "released": Qwen2ForCausalLM,
    "full": LlamaForCausalLM,
    "full-lora": LlamaForCausalLM,
    "full-prompt": LlamaForCausalLM,
}
TOLERANCE = 2e-5  # float32 rounding of logits of size 1 to 5 through two layers


@torch.no_grad()
def compare(model, name):
    expected = load_file(OLD / f"{name}.safetensors")
    ids = expected["input_ids"]
    torch.testing.assert_close(model(ids).logits, expected["logits"], rtol=0, atol=TOLERANCE)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), expected["greedy"])


@pytest.mark.parametrize("read", [parscale.load, AutoModelForCausalLM.from_pretrained], ids=["load", "auto"])
@pytest.mark.parametrize("name", FULL)
def test_a_full_folder(name, read):
    model = read(OLD / name)
    assert type(model) is FULL[name]
    compare(model, name)


def test_a_further_set():
    model = parscale.load(OLD / "released")
    model.set_streams("wide")
    compare(model, "wide")


def test_streams_only():
    compare(parscale.load(OLD / "streams", backbone=OLD / "backbone"), "streams")


def test_streams_only_on_a_model_that_is_loaded():
    model = parscale.wrap(AutoModelForCausalLM.from_pretrained(OLD / "backbone"), 3, prefix_length=2, init="random")
    model.load_streams(OLD / "streams", "old")
    model.set_streams("old")
    compare(model, "streams")


def test_a_full_folder_is_read_by_its_own_code():
    """The few lines of code in the folder import what is still there."""
    compare(AutoModelForCausalLM.from_pretrained(OLD / "full", trust_remote_code=True), "full")
