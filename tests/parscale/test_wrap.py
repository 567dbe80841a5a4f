"""Wrapping takes nothing from a model: what it is, what it was, what a failed attempt leaves, and what is refused."""

import copy
import dataclasses
import inspect
import pickle
import pydoc
from functools import partial

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_calls import logits_of
from torch import nn

import parscale
from parscale import ParScaleConfig, UnsupportedModelError
from parscale.methods import add_streams

RECORDED = {"parscale_n", "parscale_n_tokens", "parscale_attn_smooth", "parscale_init", "parscale_seed"}


def snapshot(model):
    """All that can be seen of a model but its weights' values."""
    return {
        "type": type(model),
        "forward": type(model).forward,
        "config": model.config.to_dict(),
        "configs": [id(module.__dict__.get("config")) for module in model.modules()],
        "names": [name for name, _ in model.named_parameters()],
        "trains": [parameter.requires_grad for parameter in model.parameters()],
        "modules": [name for name, _ in model.named_modules()],
        "buffers": [name for name, _ in model.named_buffers()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "training": [module.training for module in model.modules()],
        "hooks": [
            len(hooks)
            for module in model.modules()
            for name, hooks in sorted(module.__dict__.items())
            if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
        ],
        "state": sorted(model.state_dict()),
    }


def test_wrap_returns_the_same_object_of_the_same_class(family, zoo):
    model = family.plain()
    before, forward = type(model), model.forward
    wrapped = parscale.wrap(model, 2, prefix_length=3, init="random")
    assert wrapped is model
    assert type(model) is before
    assert isinstance(model, transformers.PreTrainedModel)
    assert model.forward == forward
    assert model.num_streams == 2
    assert not model.training
    added = [name for name, _ in model.named_parameters() if "prefix_" in name or "aggregate_layer" in name]
    layers = family.family.attention_layers or range(model.config.num_hidden_layers)
    assert len(added) == 2 * len(layers) + 4


@pytest.mark.grid
@pytest.mark.parametrize("off", ["num_streams=1", "unwrap", "set_streams(None)", "use_streams(None)"])
def test_without_streams_the_backbone_is_itself_to_the_last_bit(case, zoo, off):
    ids, plain = zoo.token_ids(), case.plain()
    expected = logits_of(plain, ids)
    if off == "num_streams=1":
        model = parscale.wrap(case.plain(), 1)
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
        fields = model.config.to_dict()
        assert {name: value for name, value in fields.items() if name not in RECORDED} == plain.config.to_dict()
        assert model.num_streams == 1
    else:
        model = case.wrapped()
        assert not torch.equal(logits_of(model, ids), expected)
    if off == "unwrap":
        assert parscale.unwrap(model) is model
        assert snapshot(model) | {"configs": None} == snapshot(plain) | {"configs": None}
        assert model.config.to_dict() == plain.config.to_dict()
    elif off == "set_streams(None)":
        model.set_streams(None)
        assert model.num_streams == 1
    if off == "use_streams(None)":
        with model.use_streams(None):
            assert model.num_streams == 1
            assert torch.equal(logits_of(model, ids), expected)
        assert model.num_streams == zoo.P
        assert not torch.equal(logits_of(model, ids), expected)
    else:
        assert torch.equal(logits_of(model, ids), expected)


def test_wrapping_again_after_unwrapping(family, zoo):
    model, ids = family.wrapped(), zoo.token_ids()
    expected = logits_of(model, ids)
    parscale.wrap(parscale.unwrap(model), zoo.P, prefix_length=zoo.T, init="random")
    zoo.fill_streams(model)
    assert torch.equal(logits_of(model, ids), expected)


def test_the_configuration_says_what_was_done(family):
    model = parscale.wrap(family.plain(), 2, prefix_length=3, smoothing=0.25, init="random", seed=7)
    assert model.config.parscale_n == 2
    assert model.config.parscale_n_tokens == 3
    assert model.config.parscale_attn_smooth == 0.25
    assert model.config.to_dict().keys() >= RECORDED
    assert ParScaleConfig.from_fields(model.config.to_dict()) == ParScaleConfig(2, 3, 0.25, "random", 7)
    assert model.config.model_type == family.plain().config.model_type


def test_a_configuration_object_in_place_of_numbers(family, zoo):
    config = ParScaleConfig(2, 3, 0.25, "random", 7)
    one = parscale.wrap(family.plain(), config)
    other = parscale.wrap(family.plain(), 2, prefix_length=3, smoothing=0.25, init="random", seed=7)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.parscale.active.config == config
    config.num_streams = 0  # whoever changes it later changes no model
    assert one.parscale.active.config.num_streams == 2
    for call in (parscale.wrap, lambda model, *args, **kwargs: one.add_streams("more", *args, **kwargs)):
        with pytest.raises(ValueError, match=r"num_streams must be at least 1, got 0"):
            call(family.plain(), config)
        with pytest.raises(ValueError, match=r"sets all fields, so smoothing=0\.5"):
            call(family.plain(), ParScaleConfig(2), smoothing=0.5)


@pytest.mark.parametrize("function", [partial(parscale.wrap, None), partial(add_streams, None, "more")])
def test_fields_beside_a_configuration_are_refused_also_those_of_the_defaults(function):
    config, (_, *others) = ParScaleConfig(8, kv="shared"), dataclasses.fields(ParScaleConfig)
    for field in others:
        with pytest.raises(ValueError, match=f"{field.name}={field.default!r} cannot be given beside it"):
            function(config, **{field.name: field.default})
        with pytest.raises(ValueError, match="sets all fields"):
            function(num_streams=config, **{field.name: field.default})
    with pytest.raises(ValueError, match=r"so rank=8, kv='own' cannot be given .* ParScaleConfig\(rank=8, kv='own', "):
        function(config, kv="own", rank=8)


def test_two_models_from_one_configuration_object(case, zoo):
    config, ids = case.family.config(case.attention), zoo.token_ids()
    name = type(case.plain()).__name__
    first, second = (getattr(transformers, name)(config).eval() for _ in range(2))
    shared, fields = first.config is second.config, second.config.to_dict()
    expected = logits_of(second, ids)
    parscale.wrap(first, 3, prefix_length=4, init="random")
    first.config.use_cache = False
    assert second.config.to_dict() == fields
    assert not hasattr(second.config, "parscale_n")
    assert torch.equal(logits_of(second, ids), expected)
    parscale.wrap(second, 2, prefix_length=5, init="random")
    assert (first.config.parscale_n, second.config.parscale_n) == (3, 2)
    assert first.num_streams == 3
    assert shared  # or this test would test nothing
    parscale.unwrap(first)
    assert second.config.parscale_n == 2


@pytest.mark.grid
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_new_parameters_have_the_models_dtype(family, zoo, dtype):
    model = parscale.wrap(family.plain(dtype=dtype), 2, prefix_length=3, init="random")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    logits = logits_of(model, zoo.token_ids())
    assert logits.dtype == dtype
    assert logits.isfinite().all()


@pytest.mark.grid
@pytest.mark.parametrize("training", [True, False])
def test_whether_it_trains_stays(family, training):
    model = family.plain().train(training)
    parscale.wrap(model, 2, prefix_length=3, init="random")
    assert all(module.training is training for module in model.modules())
    model.train(not training)
    assert model.get_decoder().aggregate_layer.training is not training


def test_frozen_parameters_stay_frozen(family):
    model = family.plain().requires_grad_(False)
    parscale.wrap(model, 2, prefix_length=3, init="random")
    assert all(p.requires_grad is ("prefix_" in n or "aggregate_layer" in n) for n, p in model.named_parameters())


# -- copies


@pytest.mark.grid
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_a_model_of_its_own(family, zoo, how):
    model, ids = family.wrapped(), zoo.token_ids()
    model.add_streams("other", 2, prefix_length=2, init="random")
    zoo.fill_streams(model, name="other", seed=5)
    model.set_streams("other")
    model.set_streams("default")
    expected = logits_of(model, ids)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(logits_of(twin, ids), expected)
    twin.set_streams("other")
    assert (twin.num_streams, model.num_streams) == (2, zoo.P)
    assert torch.equal(logits_of(model, ids), expected)
    assert twin.config.parscale_n == 2
    assert model.config.parscale_n == zoo.P
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training
    parscale.unwrap(twin)
    assert torch.equal(logits_of(model, ids), expected)
    assert model.num_streams == zoo.P


def test_help_describes_the_methods(tiny):
    """By the functions' own docstrings and arguments, also in copies."""
    model = parscale.wrap(tiny(), 1)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert "Adds a set of streams on the same backbone" in pydoc.render_doc(twin.add_streams)
        assert inspect.getdoc(twin.generate).startswith("Generates as the model's own method does.")
        assert list(inspect.signature(twin.load_streams).parameters) == ["path_or_repo", "name", "revision", "token"]
        assert twin.add_streams.args == (twin,)


# -- the meta device


def test_meta_device(family, zoo):
    with torch.device("meta"):
        model = family.family.build(family.attention)
    parscale.wrap(model, 2, prefix_length=3, init="random")
    solid = parscale.wrap(family.plain(), 2, prefix_length=3, init="random")
    assert all(parameter.is_meta for parameter in model.parameters())
    shapes = {name: tensor.shape for name, tensor in solid.named_parameters()}
    assert {name: tensor.shape for name, tensor in model.named_parameters()} == shapes
    with pytest.raises(ValueError, match=r"meta device.*init='random'"):
        model.add_streams("other", 2, prefix_length=3, init="context")
    assert {name: tensor.shape for name, tensor in model.named_parameters()} == shapes


# -- what is refused

BAD_NUMBERS = {
    "num_streams": (0, -1, True, False, "4", 2.0, None, float("nan"), float("inf"), [2], 1 + 0j),
    "prefix_length": (0, -3, True, "48", 48.0, None, float("nan"), float("inf")),
    "smoothing": (-0.1, 1.1, float("nan"), float("inf"), True, "0.1", None, 0.1j, [0.1]),
    "init": ("zeros", "Random", "", 1, True),
    "seed": (-1, 1.5, "1", True, float("nan"), 2**64),
    "transform": ("bias", "Prefix", "", None, 1, True),
    "rank": (0, -1, True, "8", 8.0, None, float("nan")),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_NUMBERS.items() for value in values])
def test_bad_numbers(zoo, name, value):
    model = zoo.FAMILIES["llama"].build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=name) as error:
        parscale.wrap(model, **{name: value})
    assert not isinstance(error.value, UnsupportedModelError)
    assert repr(value) in str(error.value) or str(value) in str(error.value)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match=name):
        ParScaleConfig(**{name: value})
    parscale.wrap(model, 1)
    with pytest.raises(ValueError, match=name):
        model.add_streams("other", **{"num_streams": 2} | {name: value})
    assert list(model.parscale.sets) == ["default"]


NUMBERS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.complex_numbers(),
    st.binary(max_size=2),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(num_streams=NUMBERS, prefix_length=NUMBERS, smoothing=NUMBERS, seed=NUMBERS)
def test_a_configuration_holds_what_is_allowed_or_raises(num_streams, prefix_length, smoothing, seed):
    try:
        config = ParScaleConfig(num_streams, prefix_length, smoothing, "random", seed)
    except ValueError:
        return
    assert type(config.num_streams) is int
    assert type(config.prefix_length) is int
    assert type(config.smoothing) is float
    assert config.num_streams >= 1
    assert config.prefix_length >= 1
    assert 0 <= config.smoothing <= 1
    assert seed is None or 0 <= config.seed < 2**64


def test_wrapped_twice(family, zoo):
    model, ids = family.wrapped(), zoo.token_ids()
    expected, before = logits_of(model, ids), snapshot(model)
    with pytest.raises(ValueError, match=r"wrapped already.*add_streams.*unwrap"):
        parscale.wrap(model, 2, init="random")
    assert snapshot(model) == before
    assert torch.equal(logits_of(model, ids), expected)


@pytest.mark.parametrize("inner_first", [True, False])
def test_wrapped_as_a_part_of_another(tiny, inner_first, zoo):
    """Both would keep their tensors under the same names in the same layers, and one would take the other's away."""
    model = tiny()
    first, second = (model.model, model) if inner_first else (model, model.model)
    parscale.wrap(first, zoo.P, prefix_length=zoo.T, init="random", seed=0)
    zoo.fill_streams(first)
    expected, before = logits_of(model, zoo.token_ids()), snapshot(model)
    with pytest.raises(ValueError, match=r"wrapped already, by itself or as a part of another model.*unwrap"):
        parscale.wrap(second, 2, prefix_length=3, init="random")
    assert snapshot(model) == before
    assert torch.equal(logits_of(model, zoo.token_ids()), expected)
    parscale.unwrap(first)
    assert parscale.wrap(second, 2, prefix_length=3, init="random").num_streams == 2


def test_unwrapping_what_is_not_wrapped(family):
    with pytest.raises(ValueError, match=r"not wrapped.*parscale\.wrap"):
        parscale.unwrap(family.plain())


@pytest.mark.parametrize(
    "thing", [None, "Qwen/Qwen2.5-0.5B", transformers.LlamaForCausalLM, nn.Linear(2, 2), 3, nn.Module()], ids=repr
)
def test_what_is_not_a_model(thing):
    given = "the class LlamaForCausalLM" if isinstance(thing, type) else type(thing).__name__
    with pytest.raises(
        UnsupportedModelError, match=rf"takes a loaded Hugging Face model.*got {given}: load.*pretrained"
    ):
        parscale.wrap(thing, 2)
    with pytest.raises(ValueError, match="not wrapped"):
        parscale.unwrap(thing)


def small(name, **options):
    common = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return getattr(transformers, f"{name}Config")(**common | sizes | options)


REFUSED = {
    "no attention": lambda: transformers.MambaForCausalLM(small("Mamba", state_size=4)),
    "no attention, newer": lambda: transformers.Mamba2ForCausalLM(
        small("Mamba2", num_heads=4, head_dim=16, state_size=8, n_groups=1)
    ),
    "attention without a cache": lambda: transformers.OpenAIGPTLMHeadModel(small("OpenAIGPT", n_layer=2, n_head=4)),
    "attention with memories": lambda: transformers.XLNetLMHeadModel(
        small("XLNet", d_model=32, n_layer=2, n_head=4, d_inner=48)
    ),
    "sound as it is": lambda: transformers.Wav2Vec2Model(
        small("Wav2Vec2", conv_dim=[16], conv_stride=[5], conv_kernel=[10], num_conv_pos_embedding_groups=2)
    ),
    "convolutions": lambda: transformers.ResNetModel(transformers.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1])),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_models_that_cannot_carry_streams(make):
    torch.manual_seed(0)
    model = make().eval()
    before, weights = snapshot(model), copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=type(model).__name__) as error:
        parscale.wrap(model, 2, prefix_length=3, init="random")
    assert len(str(error.value)) > 80  # says why, and what to do
    assert snapshot(model) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.grid
@pytest.mark.parametrize("failure", ["calibration", "in the backbone", "in the init", "interrupted"])
def test_a_failed_attempt_leaves_nothing(family, zoo, failure, monkeypatch):
    model, ids, arguments, error = family.plain(), zoo.token_ids(), {}, ValueError
    model.config.parscale_n = 17  # whatever it held before, it holds again
    before, expected = snapshot(model), logits_of(model, ids)
    if failure == "calibration":
        arguments = {"calibration": torch.zeros(2, 5, dtype=torch.long)}
    elif failure == "in the backbone":
        error = RuntimeError

        def broken(*args, **kwargs):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(model.get_decoder(), "forward", broken)
    else:
        error = KeyboardInterrupt if failure == "interrupted" else RuntimeError

        def fails(*args, **kwargs):
            raise error

        monkeypatch.setattr("parscale.hooks.adding.initialize", fails)
    with pytest.raises(error):
        parscale.wrap(model, 2, prefix_length=3, **arguments)
    monkeypatch.undo()
    assert snapshot(model) == before
    assert torch.equal(logits_of(model, ids), expected)


# -- torch.compile


@pytest.mark.parametrize("case", ["llama-sdpa"], indirect=True)
def test_a_training_forward_compiles_as_one_graph(case, zoo):
    model, ids = case.wrapped().train(), zoo.token_ids()
    model.add_streams("more", 2, prefix_length=3, init="random")
    model.set_streams("more")
    model.set_streams("default")
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    model.zero_grad()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(input_ids=ids, labels=ids).loss.backward()
    for name, gradient in expected.items():
        zoo.close(dict(model.named_parameters())[name].grad, gradient, 2e-5)
