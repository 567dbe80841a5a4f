"""Streams made after a model was cast or moved, or in the middle of other code: as if made for it as it is."""

import contextlib
import copy

import pytest
import torch

import parscale

BRAIN = torch.bfloat16
TRANSFORMS = ["prefix", "prompt", "lora"]
WAYS = ["add_streams", "load_streams"]
OWN = ("prefix_", "prompt", "stream_", "aggregate_layer")


def streams_of(model, name="default"):
    """The parameters of a set."""
    suffix = "" if name == "default" else f"@{name}"
    named = [(n, p) for n, p in model.named_parameters() if any(part in n for part in OWN)]
    return {n: p for n, p in named if ("@" in n) == bool(suffix) and suffix in n}


def options(transform):
    return {"prefix_length": 4, "init": "random", "seed": 0, "transform": transform}


def further_set(model, transform, way, tiny, folder):
    """A set `"two"`, made anew or read from a folder that a float32 model has written."""
    if way == "add_streams":
        model.add_streams("two", 2, **options(transform))
    else:
        parscale.wrap(tiny(), 2, **options(transform)).save_streams(folder)
        model.load_streams(folder, "two")
    model.set_streams("two")


def through_meta(model):
    model.to("meta").to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.normal_(tensor.data, std=0.1)
    return model


CHANGES = {
    "to bfloat16": (lambda model: model.to(BRAIN), BRAIN),
    "half": (lambda model: model.half(), torch.float16),
    "double": (lambda model: model.double(), torch.float64),
    "there and back": (lambda model: model.to(BRAIN).float(), torch.float32),
    "a copy": (lambda model: copy.deepcopy(model).to(BRAIN), BRAIN),
    "by way of the meta device": (through_meta, torch.float32),
}


@pytest.mark.grid
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_of_the_weights(change, transform, way, tiny, zoo, tmp_path):
    apply, dtype = CHANGES[change]
    for first in (1, 3):  # a model wrapped with one stream has nothing to look at
        model = apply(parscale.wrap(tiny(), first, **options("prefix")))
        further_set(model, transform, way, tiny, tmp_path / str(first))
        assert {p.dtype for p in streams_of(model, "two").values()} == {dtype}
        assert {p.device.type for p in streams_of(model, "two").values()} == {"cpu"}
        assert model(zoo.token_ids()).logits.dtype == dtype


def test_a_loaded_set_keeps_its_values_in_another_dtype(tiny, tmp_path):
    source = parscale.wrap(tiny(), 2, **options("prefix"))
    source.save_streams(tmp_path)
    model = parscale.wrap(tiny(), 3, **options("prefix")).to(BRAIN)
    model.load_streams(tmp_path, "two")
    for (name, own), (other, value) in zip(streams_of(model, "two").items(), streams_of(source).items(), strict=True):
        assert name.replace("@two", "") == other
        assert torch.equal(own, value.to(BRAIN))
    model.float().load_streams(tmp_path, "three")
    for own, value in zip(streams_of(model, "three").values(), streams_of(source).values(), strict=True):
        assert torch.equal(own, value)


# -- in the middle of other code


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "a default dtype": lambda: default_dtype(torch.float64),
    "a default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", BRAIN),
}


@pytest.mark.grid
@pytest.mark.parametrize("way", ["wrap", "texts", "add_streams", "load_streams", "load"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("around", AROUND)
def test_what_is_around_does_not_matter(around, transform, way, tiny, zoo, tmp_path):
    """The same parameters as without anything around, and they train."""

    def make(context):
        model, name = tiny(), "default"
        if way in ("add_streams", "load_streams"):
            parscale.wrap(model, 3, **options("prefix"))
            name = "two"
        with context():
            if way == "wrap":
                parscale.wrap(model, 2, **options(transform))
            elif way == "texts":
                init = "random" if transform == "lora" else "context"
                parscale.wrap(model, 2, **options(transform) | {"init": init})
            elif way == "add_streams":
                model.add_streams("two", 2, **options(transform))
            elif way == "load_streams":
                model.load_streams(tmp_path, "two")
            else:
                parscale.load(tmp_path, backbone=model)
        model.set_streams(name)
        return model, streams_of(model, name)

    parscale.wrap(tiny(), 2, **options(transform)).save_streams(tmp_path)
    _, expected = make(contextlib.nullcontext)
    model, found = make(AROUND[around])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert not found[name].is_inference()
    ids = zoo.token_ids()
    model(ids, labels=ids).loss.backward()
    assert all(tensor.grad is not None for tensor in found.values())


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_model_that_is_loaded_in_inference_mode_trains(transform, tiny, zoo, tmp_path):
    """All of it, the backbone too."""
    parscale.wrap(tiny(), 2, **options(transform)).save_pretrained(tmp_path)
    with torch.inference_mode():
        model = parscale.load(tmp_path)
    ids = zoo.token_ids()
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_low_rank_differences_of_a_backbone_made_in_inference_mode(tiny, zoo):
    """Where they go is found by a gradient, which such a backbone does not give; so they are the same ones."""
    with torch.inference_mode():
        model = parscale.wrap(tiny(), 2, **options("lora"))
        logits = model(zoo.token_ids()).logits
    expected = parscale.wrap(tiny(), 2, **options("lora"))
    assert streams_of(model).keys() == streams_of(expected).keys()
    assert torch.equal(logits, expected(zoo.token_ids()).logits)
    assert next(model.model.layers.parameters()).is_inference()  # the backbone's own are what they were
    with torch.inference_mode():
        assert torch.equal(parscale.unwrap(model)(zoo.token_ids()).logits, tiny()(zoo.token_ids()).logits)
