"""What the released code answers for five tiny checkpoints of its format; see tests/golden/README.md."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from parscale import load

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = sorted(folder.name for folder in GOLDEN.iterdir() if folder.is_dir())
PROMISED = 1e-5  # by the README, of logits in float32; the largest difference found is 6e-6
GENERATION = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def expected(case):
    return load_file(GOLDEN / case / "expected.safetensors")


@pytest.fixture(scope="module", params=["released", "saved again", "saved again in shards"])
def folder(request, case, tmp_path_factory):
    """The checkpoint as it was released, or loaded and saved again."""
    if request.param == "released":
        return GOLDEN / case
    folder = tmp_path_factory.mktemp("saved") / case
    shards = {"max_shard_size": "100KB"} if "shards" in request.param else {}
    load(GOLDEN / case).save_pretrained(folder, **shards)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@torch.no_grad()
def test_logits(model, expected):
    logits = model(expected["input_ids"]).logits
    assert (logits - expected["logits"]).abs().max() < PROMISED


@torch.no_grad()
def test_padded_logits(model, expected):
    mask = expected["attention_mask"]
    positions = expected["padded_position_ids"]
    logits = model(expected["input_ids"], attention_mask=mask, position_ids=positions).logits
    assert (logits - expected["padded_logits"])[mask.bool()].abs().max() < PROMISED


def test_generation(model, expected):
    ids, mask = expected["input_ids"], expected["attention_mask"]
    assert torch.equal(model.generate(ids, **GENERATION), expected["greedy"])
    assert torch.equal(model.generate(ids, attention_mask=mask, **GENERATION), expected["padded_greedy"])
    assert torch.equal(model.generate(ids, num_beams=3, **GENERATION), expected["beam3"])


def test_gradients_in_float64(folder, expected):
    """Relative to each gradient's norm. Both codes compute norms of the backbone and the loss in float32."""
    model = load(folder, dtype=torch.float64)
    output = model(expected["input_ids"], labels=expected["input_ids"])
    output.loss.backward()
    assert (output.logits - expected["logits_f64"]).abs().max() < 1e-6
    assert abs(output.loss - expected["loss_f64"]) < 1e-6 * expected["loss_f64"]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    wanted = {name.removeprefix("grad_f64."): value for name, value in expected.items() if name.startswith("grad_f64.")}
    assert wanted.keys() <= gradients.keys()
    for name, value in wanted.items():
        assert (gradients[name] - value).norm() < 1e-6 * value.norm(), name


def test_saved_again_has_the_released_names_and_shapes(case, tmp_path):
    load(GOLDEN / case).save_pretrained(tmp_path / case)
    for name, released in tensors_of(GOLDEN / case).items():
        assert torch.equal(tensors_of(tmp_path / case)[name], released)
    assert tensors_of(tmp_path / case).keys() == tensors_of(GOLDEN / case).keys()
    assert sorted(path.name for path in (tmp_path / case).iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_parscale.py",
    ]


def test_saved_again_has_the_released_configuration(case, tmp_path):
    """Every field that the released code reads, under the name by which it reads it."""
    load(GOLDEN / case).save_pretrained(tmp_path / case)
    saved, released = (json.loads((root / case / "config.json").read_text()) for root in (tmp_path, GOLDEN))
    for own in ("auto_map", "transformers_version"):
        saved.pop(own)
        released.pop(own)
    assert {key: saved[key] for key in released} == released
    own = {"parscale_init", "parscale_seed", "parscale_version"}
    added = {"dtype", "eos_token_id", "layer_types", "rope_parameters"} | own
    assert saved.keys() - released.keys() == added


def tensors_of(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
