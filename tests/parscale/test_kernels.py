"""The one argument that chooses how the streams' operations run."""

import importlib

import pytest
import torch
from model_calls import given

import parscale
from parscale.kernels import dispatch

IMPL = ["auto", "reference"]


@pytest.fixture
def seen(monkeypatch):
    """What each operation was told, in the order of the calls."""
    told = []

    def note(name, function):
        def noted(*args, **kwargs):
            told.append((name, kwargs.get("impl", args[3] if name == "flash_supports" else None)))
            return function(*args, **kwargs)

        return noted

    for module, name in (
        ("attention.registered", "flash_supports"),
        ("attention.registered", "decode_attention"),
        ("streams.aggregator", "aggregate"),
    ):
        target = getattr(__import__(f"parscale.{module}", fromlist=[module]), name)
        monkeypatch.setattr(f"parscale.{module}.{name}", note(name, target))
    return told


def make(zoo, impl):
    model = zoo.Case(zoo.FAMILIES["llama"], "sdpa").plain()
    parscale.wrap(model, zoo.P, prefix_length=zoo.T, init="random", kernels=impl)
    zoo.fill_streams(model)
    return model


@torch.no_grad()
def steps(model, ids):
    """Logits of a prompt, then of one more token."""
    output = model(ids[:, :-1], use_cache=True)
    return torch.cat([output.logits, model(ids[:, -1:], **given(model, output.past_key_values)).logits], dim=1)


@pytest.mark.parametrize("impl", IMPL)
def test_every_operation_is_told(impl, seen, zoo):
    model, ids = make(zoo, impl), zoo.token_ids()
    seen.clear()  # of the trial when it was wrapped
    steps(model, ids)
    layers = model.config.num_hidden_layers
    prompt, token = [("flash_supports", impl)] * layers, [("decode_attention", impl)] * layers
    assert seen == [*prompt, ("aggregate", impl), *token, ("aggregate", impl)]


@pytest.mark.parametrize("impl", ["auto", "fused"])
def test_the_trial_of_a_whole_model_compiles_no_kernel(impl, seen, zoo):
    assert make(zoo, impl).parscale.kernels == impl
    assert {told for _, told in seen} == {"reference"}


def test_both_implementations_give_the_same_logits(zoo, tmp_path):
    family, ids = zoo.FAMILIES["llama"], zoo.token_ids()
    models = [make(zoo, impl) for impl in IMPL]
    models[0].save_pretrained(tmp_path / "full")
    models[0].save_streams(tmp_path / "streams")
    models.append(parscale.load(tmp_path / "full", kernels="reference", attn_implementation="sdpa"))
    models.append(parscale.load(tmp_path / "streams", backbone=zoo.Case(family, "sdpa").plain(), kernels="reference"))
    assert [model.parscale.kernels for model in models] == ["auto", *["reference"] * 3]
    expected = steps(models[0], ids)
    for model in models[1:]:
        zoo.close(steps(model, ids), expected, 2e-5)
    assert "kernels" not in (tmp_path / "full" / "config.json").read_text()


@pytest.mark.parametrize(
    "options",
    [{"init": "context"}, {"kv": "shared"}, {"transform": "prompt"}, {"kv": "shared", "transform": "lora"}],
    ids=str,
)
def test_kernels_that_cannot_run_are_an_error(options, zoo, monkeypatch):
    """Of a call, where nothing falls back in silence; a model is wrapped before it goes to its device."""
    monkeypatch.setattr(dispatch, "_interpreted", lambda: False)
    model = zoo.Case(zoo.FAMILIES["llama"], "sdpa").plain()
    parscale.wrap(model, 2, prefix_length=zoo.T, kernels="fused", **options)
    assert model.parscale.kernels == "fused"
    message = r"^impl='fused' cannot run here: (the tensors are on cpu|Triton is not).*kernels='fused'"
    with pytest.raises(ValueError, match=message):
        model(zoo.token_ids())


def test_more_queries_of_a_shared_key_than_the_kernel_takes(zoo, monkeypatch):
    """Each stream runs by itself, here by plain torch, and sees the whole cache in a step without a mask."""
    model, ids = zoo.share(zoo.Case(zoo.FAMILIES["llama"], "sdpa").plain()), zoo.token_ids()
    expected = steps(model, ids)
    model.parscale.kernels = "fused"
    monkeypatch.setattr("parscale.attention.shared.fits_fused", lambda query, key: False)
    for operation in ("decode_attention", "aggregate", "aggregator"):
        api = importlib.import_module(f"parscale.kernels.{operation}.api")
        monkeypatch.setattr(api, "runs_fused", lambda *args: False)
    zoo.close(steps(model, ids), expected, 2e-5)


def test_an_unknown_choice(zoo, tmp_path):
    plain = zoo.FAMILIES["llama"].build()
    with pytest.raises(ValueError, match="kernels must be 'auto', 'fused' or 'reference', got 'triton'"):
        parscale.wrap(plain, 2, kernels="triton")
    assert not hasattr(plain, "parscale")
    with pytest.raises(ValueError, match="kernels must be 'auto', 'fused' or 'reference', got 'triton'"):
        parscale.load(tmp_path, kernels="triton")
