"""Several sets of streams on one backbone, and what the members of a wrapped model report about them."""

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from model_calls import choose_stream, logits_of
from transformers import DynamicCache, LlamaForSequenceClassification, LlamaModel

import parscale
from parscale.streams.state import active_streams, find_state

TOLERANCE = 2e-5  # as in test_families.py
FEW = pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "deepseek_v3", "qwen3_next"], indirect=True)


def tensors_of(model, name):
    suffix = "" if name == "default" else f"@{name}"
    ends = (f"prefix_k{suffix}", f"prefix_v{suffix}")
    return {n: p for n, p in model.named_parameters() if n.endswith(ends) or f"aggregate_layer{suffix}." in n}


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def model(family, zoo):
    """Three sets: `default` with P = 3, `two` with P = 2 and another T, `one` with P = 1."""
    model = family.wrapped()
    model.add_streams("two", 2, prefix_length=6, smoothing=0.3, init="random")
    model.add_streams("one", 1)
    zoo.fill_streams(model, seed=3, name="two")
    return model


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_the_state_is_found_in_a_wrapped_model_alone(family):
    model = family.wrapped()
    assert find_state(model) is model.parscale
    assert model.parscale.model is model
    assert active_streams(model) is model.parscale.sets["default"]
    with model.use_streams(None):
        assert active_streams(model) is None
    for other in (family.plain(), SimpleNamespace(parscale="a name of its own"), None):
        assert find_state(other) is None
        assert active_streams(other) is None


@FEW
def test_each_set_is_what_it_would_be_alone(model, family, zoo):
    ids = zoo.token_ids()
    expected = {"default": logits_of(family.wrapped(), ids), None: logits_of(family.plain(), ids)}
    expected["one"] = expected[None]
    alone = parscale.wrap(family.plain(), 2, prefix_length=6, smoothing=0.3, init="random")
    zoo.fill_streams(alone, seed=3)
    expected["two"] = logits_of(alone, ids)
    for name in ("default", "two", None, "one", "default", "one", "two", "two"):
        model.set_streams(name)
        assert torch.equal(logits_of(model, ids), expected[name]), name
        assert model.num_streams == {"default": 3, "two": 2, "one": 1, None: 1}[name]
        if name is not None:
            assert model.config.parscale_n == model.num_streams
            assert model.config.parscale_n_tokens == model.parscale.sets[name].config.prefix_length
            assert model.config.parscale_attn_smooth == model.parscale.sets[name].config.smoothing


@FEW
def test_only_the_active_set_trains(model):
    backbone = {name for name, _ in model.named_parameters()} - tensors_of(model, "default").keys()
    backbone -= tensors_of(model, "two").keys()
    assert trained(model) == backbone | tensors_of(model, "default").keys()
    model.set_streams("two")
    assert trained(model) == backbone | tensors_of(model, "two").keys()
    model.set_streams(None)
    assert trained(model) == backbone
    model.set_streams("one")
    assert trained(model) == backbone
    model.set_streams("two")
    model.freeze_backbone()
    assert trained(model) == tensors_of(model, "two").keys()
    model.set_streams("default")
    assert trained(model) == tensors_of(model, "default").keys()


@FEW
def test_freeze_backbone_needs_streams_that_train(model):
    for name in (None, "one"):
        model.set_streams(name)
        before = trained(model)
        with pytest.raises(ValueError, match=r"nothing would be trainable.*set_streams"):
            model.freeze_backbone()
        assert trained(model) == before


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_the_streams_parameters_are_those_of_the_active_set(model):
    """Each once, whether or not they train."""
    for name in ("two", "one", None, "default"):
        model.set_streams(name)
        found = model.stream_parameters()
        assert len(found) == len(set(found))
        assert set(found) == ({*tensors_of(model, name).values()} if name in ("default", "two") else set())
    model.requires_grad_(False)
    with model.use_streams("two"):
        assert set(model.stream_parameters()) == {*tensors_of(model, "two").values()}
    assert set(model.stream_parameters()) == {*tensors_of(model, "default").values()}
    parscale.unwrap(model)
    assert not hasattr(model, "stream_parameters")


@FEW
def test_a_block_with_other_streams(model, zoo):
    ids = zoo.token_ids()
    expected = {}
    for name in ("two", None, "default"):
        model.set_streams(name)
        expected[name] = logits_of(model, ids)
    model.freeze_backbone()
    frozen = next(iter(tensors_of(model, "default").values())).requires_grad_(False)  # a choice to be kept
    before, fields = trained(model), model.config.to_dict()
    with model.use_streams("two") as same:
        assert same is model
        assert model.num_streams == 2
        assert trained(model) == tensors_of(model, "two").keys()
        assert torch.equal(logits_of(model, ids), expected["two"])
        with model.use_streams(None):
            assert model.num_streams == 1
            assert torch.equal(logits_of(model, ids), expected[None])
            with model.use_streams("default"):
                assert torch.equal(logits_of(model, ids), expected["default"])
        assert torch.equal(logits_of(model, ids), expected["two"])
    assert torch.equal(logits_of(model, ids), expected["default"])
    assert (trained(model), model.config.to_dict()) == (before, fields)
    assert not frozen.requires_grad
    with pytest.raises(RuntimeError, match="in the block"), model.use_streams("two"), model.use_streams(None):
        raise RuntimeError("in the block")
    assert model.num_streams == 3
    assert (trained(model), model.config.to_dict()) == (before, fields)
    model.set_streams(None)
    fields = model.config.to_dict()
    with model.use_streams("two"):
        pass
    assert model.config.to_dict() == fields
    assert model.num_streams == 1


@FEW
def test_unknown_sets_are_refused(model):
    before = trained(model)
    with pytest.raises(ValueError, match=r"no set of streams 'three'; there are: 'default', 'two', 'one', and None"):
        model.set_streams("three")
    with pytest.raises(ValueError, match="no set of streams 'three'"), model.use_streams("three"):
        pass
    assert model.num_streams == 3
    assert trained(model) == before


@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize("name", ["", "a b", "a.b", "@a", "ä", "-a", "a/b", 3, None, "a@b", "a\n"])
def test_names_that_are_none(model, name):
    with pytest.raises(ValueError, match="takes a name of letters, digits, '-' and '_', got"):
        model.add_streams(name, 2, init="random")
    assert list(model.parscale.sets) == ["default", "two", "one"]


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_no_set_has_the_name_of_the_plain_backbone(model):
    """`--streams off` would run that in its place."""
    with pytest.raises(ValueError, match=r"cannot be called 'off'.*plain backbone: choose another name"):
        model.add_streams("off", 2, init="random")
    assert list(model.parscale.sets) == ["default", "two", "one"]


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_name_that_is_taken(model, zoo):
    expected, before = logits_of(model, zoo.token_ids()), [name for name, _ in model.named_parameters()]
    for name in ("default", "two", "one"):
        with pytest.raises(ValueError, match=f"set of streams '{name}' exists already"):
            model.add_streams(name, 2, init="random")
    assert [name for name, _ in model.named_parameters()] == before
    assert torch.equal(logits_of(model, zoo.token_ids()), expected)


@FEW
def test_sets_after_wrapping_with_one_stream(family, zoo):
    model, ids = parscale.wrap(family.plain(), 1), zoo.token_ids()
    expected = logits_of(family.plain(), ids)
    names = trained(model)
    model.add_streams("later", zoo.P, prefix_length=zoo.T, init="random")
    zoo.fill_streams(model, name="later")
    assert trained(model) == names
    assert torch.equal(logits_of(model, ids), expected)
    model.set_streams("later")
    assert torch.equal(logits_of(model, ids), logits_of(family.wrapped(), ids))
    model.set_streams("default")
    assert torch.equal(logits_of(model, ids), expected)
    parscale.unwrap(model)
    assert {name for name, _ in model.named_parameters()} == names


@FEW
def test_a_cache_belongs_to_the_set_that_filled_it(model, family, zoo):
    ids, cache = zoo.token_ids(), DynamicCache(config=model.config)
    full = logits_of(model, ids)
    logits_of(model, ids[:, :5], cache=cache)
    for name in ("two", None, "one"):
        message = r"cache was filled with streams 'default'.*are active.*new cache"
        with model.use_streams(name), pytest.raises(ValueError, match=message):
            logits_of(model, ids[:, 5:], cache=cache)
    zoo.close(logits_of(model, ids[:, 5:], cache=cache), full[:, 5:], TOLERANCE)
    with model.use_streams(None):
        cache = DynamicCache(config=model.config)
        logits_of(model, ids[:, :5], cache=cache)
    with pytest.raises(ValueError, match=r"filled with streams None, but 'default'"):
        logits_of(model, ids[:, 5:], cache=cache)


@pytest.mark.parametrize("family", ["llama", "gpt2"], indirect=True)
def test_a_cache_that_the_model_made_belongs_to_its_set(model, family, zoo):
    ids = zoo.token_ids()
    with torch.no_grad():
        made = model(ids[:, :5], use_cache=True).past_key_values
        full = model(ids).logits
        with model.use_streams("two"), pytest.raises(ValueError, match=r"filled with streams 'default', but 'two'"):
            model(ids[:, 5:], past_key_values=made)
        zoo.close(model(ids[:, 5:], past_key_values=made).logits, full[:, 5:], TOLERANCE)


# -- reports


@pytest.mark.parametrize("family", ["qwen2"], indirect=True)
def test_trainable_parameters_are_counted(family, zoo, capsys):
    P, T, H, layers, G, D = 3, 4, 32, 2, 2, 8
    model = family.wrapped(P, T)
    prefixes = layers * 2 * P * G * T * D
    aggregator = P * H * H + H + H * P + P
    backbone = sum(parameter.numel() for parameter in family.plain().parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == backbone + prefixes + aggregator

    def printed():
        model.print_trainable_parameters()
        return capsys.readouterr().out

    total, new = backbone + prefixes + aggregator, prefixes + aggregator
    line = (
        f"trainable params: {total:,} || all params: {total:,} || trainable%: 100.0000 "
        f"(prefixes: {prefixes:,}, aggregator: {aggregator:,}, others: {backbone:,})\n"
    )
    assert printed() == line
    model.freeze_backbone()
    line = (
        f"trainable params: {new:,} || all params: {total:,} || trainable%: {100 * new / total:.4f} "
        f"(prefixes: {prefixes:,}, aggregator: {aggregator:,}, others: 0)\n"
    )
    assert printed() == line
    model.add_streams("more", 2, prefix_length=5, init="random")
    model.set_streams("more")
    prefixes, aggregator = layers * 2 * 2 * G * 5 * D, 2 * H * H + H + H * 2 + 2
    assert f"(prefixes: {prefixes:,}, aggregator: {aggregator:,}, others: 0)" in printed()
    assert f"all params: {total + prefixes + aggregator:,} " in printed()


def token_losses(logits, labels):
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100
    )
    return losses[labels[:, 1:].flatten() != -100]


def test_stream_report(family, zoo):
    """Losses and correlation against runs forced to one stream, weights and entropy against the reference's."""
    model, ids = family.wrapped(), zoo.token_ids()
    labels = ids.clone()
    labels[0, :3] = labels[1, 7:] = -100
    full = logits_of(model, ids)
    report = model.stream_report(ids, labels)
    assert torch.equal(logits_of(model, ids), full)  # and everything is as before

    forced = family.wrapped(smoothing=0.0)
    losses = []
    for p in range(zoo.P):
        choose_stream(forced, p)
        losses.append(token_losses(logits_of(forced, ids), labels))
    expected = torch.stack(losses)
    zoo.close(report.losses, expected.mean(1), 1e-5)
    zoo.close(report.correlation, torch.corrcoef(expected), 1e-5)

    reference = family.reference(model)
    weights = reference.weights([reference.hidden(p, ids) for p in range(zoo.P)])
    zoo.close(report.weights, weights, 1e-5)
    zoo.close(report.entropy, -(weights * weights.log()).sum(-1), 1e-5)
    assert report.weights.shape == (zoo.B, zoo.S, zoo.P)
    assert report.entropy.shape == (zoo.B, zoo.S)
    assert report.correlation.shape == (zoo.P, zoo.P)
    zoo.close(report.weights.sum(-1), torch.ones(zoo.B, zoo.S), 1e-6)
    unlabelled = model.stream_report(ids)
    assert unlabelled.losses.shape == (zoo.P,)
    zoo.close(unlabelled.weights, report.weights, 0.0)


@pytest.mark.parametrize("family", ["llama", "gpt2"], indirect=True)
def test_stream_losses(family, zoo):
    """Losses and gradients at each token against runs forced to one stream, the mixture's against the model's."""
    model, forced, ids = family.wrapped(), family.wrapped(smoothing=0.0), zoo.token_ids()
    labels = ids.clone()
    labels[0, :3] = labels[1, 7:] = -100
    measured = model.stream_losses(ids, labels, mixture=True)
    assert measured.losses.shape == (zoo.P + 1, zoo.B, zoo.S - 1)
    assert torch.equal(measured.counted, labels[:, 1:] != -100)
    assert torch.equal(model.stream_losses(ids, labels).losses, measured.losses[:-1])
    zoo.close(model.stream_losses(ids).losses[:, measured.counted], measured.losses[:-1, measured.counted], 1e-6)

    losses = measured.losses[:, measured.counted]
    zoo.close(losses[-1], token_losses(model(input_ids=ids).logits, labels), 1e-5)
    losses[:-1].sum().backward()
    for p in range(zoo.P):
        choose_stream(forced, p)
        expected = token_losses(forced(input_ids=ids).logits, labels)
        zoo.close(losses[p], expected, 1e-5)
        expected.sum().backward()
    found, expected = ({n: p.grad for n, p in each.named_parameters() if "prefix_" in n} for each in (model, forced))
    for name, gradient in found.items():
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 1e-3
        zoo.close(gradient, expected[name], 1e-4)
    assert not hasattr(parscale.unwrap(model), "stream_losses")


def test_stream_report_of_one_token(wrapped):
    """One token's losses correlate with nothing; ids of 32 bits are labels too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = wrapped.stream_report(torch.tensor([[3, 4]], dtype=torch.int32))
    P = wrapped.num_streams
    assert report.losses.isfinite().all()
    assert report.correlation.shape == (P, P)
    assert report.correlation.isnan().all()


@torch.no_grad()
def test_losses_of_a_model_in_bfloat16_are_not_rounded(zoo):
    model, ids = zoo.Case(zoo.FAMILIES["llama"], "sdpa").wrapped(dtype=torch.bfloat16), zoo.token_ids()
    with model.parscale.calls.unmixed():
        logits = model(ids).logits.unflatten(0, (zoo.P, -1))
    expected = torch.stack([token_losses(each, ids).mean() for each in logits])
    zoo.close(model.stream_report(ids).losses, expected, 1e-5)


@FEW
def test_stream_report_at_equal_weights(family, zoo):
    model = parscale.wrap(family.plain(), 4, prefix_length=3, init="random")
    report = model.stream_report(zoo.token_ids())
    zoo.close(report.weights, torch.full((zoo.B, zoo.S, 4), 0.25), 1e-6)
    zoo.close(report.entropy, torch.full((zoo.B, zoo.S), math.log(4)), 1e-5)


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ((9,), None, r"takes input_ids \(B, S\) and labels \(B, S\), got \(9,\) and \(9,\)"),
        ((2, 9), (2, 4), r"got \(2, 9\) and \(2, 4\)"),
        ((2, 1), None, r"no loss to measure in labels \(2, 1\): give at least two tokens"),
        ((0, 9), None, r"no loss to measure in labels \(0, 9\)"),
        ((2, 9), "none", r"one after the first is not -100"),
    ],
)
def test_stream_report_of_nothing(wrapped, ids, labels, message):
    """A mean over no token is no number."""
    given = torch.ones(ids, dtype=torch.long)
    if labels is not None:
        labels = torch.full_like(given, -100) if labels == "none" else torch.ones(labels, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        wrapped.stream_report(given, labels)


@pytest.mark.parametrize("name", ["nope", 3, ["default"]])
def test_what_is_no_name_of_a_set(wrapped, name):
    with pytest.raises(ValueError, match=r"There is no set of streams .*; there are: 'default', 'code', 'one'"):
        wrapped.set_streams(name)


@FEW
def test_stream_report_without_streams(model, zoo):
    for name in (None, "one"):
        with model.use_streams(name), pytest.raises(ValueError, match=r"No streams are active.*set_streams"):
            model.stream_report(zoo.token_ids())


@FEW
def test_stream_report_after_an_error(model, zoo):
    ids = zoo.token_ids()
    expected = logits_of(model, ids)
    with pytest.raises(IndexError):
        model.stream_report(ids + zoo.VOCABULARY)
    assert torch.equal(logits_of(model, ids), expected)
    assert model.stream_report(ids).weights.shape == (zoo.B, zoo.S, zoo.P)


def test_saved_sets_come_onto_one_model(tiny, tmp_path):
    """Two sets, each saved by a model of its own, on one backbone that is wrapped already."""
    ids = torch.arange(9)[None] + 3
    expected = {}
    for name, P in (("narrow", 2), ("wide", 5)):
        model = parscale.wrap(tiny(), 1)
        model.add_streams(name, P, prefix_length=3, init="random", seed=P)
        model.set_streams(name)
        expected[name] = model.eval()(ids).logits
        model.save_streams(tmp_path / name)
    model = parscale.load(tmp_path / "narrow", backbone=tiny()).eval()
    model.load_streams(tmp_path / "wide")
    assert (model.num_streams, list(model.parscale.sets)) == (2, ["narrow", "wide"])
    assert not any(p.requires_grad for name, p in model.named_parameters() if "@wide" in name)
    for name in expected:
        model.set_streams(name)
        assert torch.equal(model(ids).logits, expected[name])
    model.load_streams(tmp_path / "wide", "again")
    model.set_streams("again")
    assert torch.equal(model(ids).logits, expected["wide"])
    with pytest.raises(ValueError, match="A set of streams 'wide' exists already: choose another name"):
        model.load_streams(tmp_path / "wide")
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="has its own backbone: load_streams reads folders written by save_streams"):
        model.load_streams(tmp_path / "full")


@pytest.mark.parametrize("cls", [LlamaModel, LlamaForSequenceClassification])
@torch.no_grad()
def test_saved_streams_that_have_read_texts_go_onto_a_model_that_generates_none(cls, tiny, tmp_path):
    """Streams do not belong to a head, whatever they started from; only new ones need a model that generates."""
    ids = torch.arange(9)[None] + 3
    tiny().save_pretrained(tmp_path / "backbone")
    model = parscale.wrap(tiny(), 2, prefix_length=3, seed=0).eval()
    assert model.config.parscale_init == "documents"
    model.save_streams(tmp_path / "streams")
    loaded, later = (cls.from_pretrained(tmp_path / "backbone") for _ in range(2))
    parscale.load(tmp_path / "streams", backbone=loaded)
    parscale.wrap(later, 1).load_streams(tmp_path / "streams", "texts")
    later.set_streams("texts")
    loaded.save_pretrained(tmp_path / "full")
    for other in (loaded, later, parscale.load(tmp_path / "full")):
        assert type(other) is cls
        assert torch.equal(other.base_model(ids)[0], model.base_model(ids)[0])
    with pytest.raises(ValueError, match=f"{cls.__name__} is not one: omit it, or use init='random'"):
        later.add_streams("new", 2, prefix_length=3, init="documents")


def test_saved_streams_of_another_backbone(tiny, tmp_path):
    other = parscale.wrap(tiny(hidden_size=48), 2, init="random")
    other.save_streams(tmp_path)
    with pytest.raises(ValueError, match="hidden"):
        parscale.wrap(tiny(), 1).load_streams(tmp_path, "other")


def test_streams_alone_under_the_names_of_another_set_warn(wrapped):
    """Whole state dicts, a backbone's own and those of the active set say nothing."""
    of_code = wrapped.parscale.tensors(wrapped.parscale.sets["code"])
    alone = {released: torch.full_like(tensor, 3.0) for released, tensor in of_code.items()}
    wrapped.set_streams("code")
    said = r"names of the set 'default', and is loaded into the active set, 'code'.*set_streams\('default'\) before"
    with pytest.warns(UserWarning, match=said) as found:
        wrapped.load_state_dict(alone, strict=False)
    assert found[0].filename == __file__
    assert all((tensor == 3).all() for tensor in of_code.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped.load_state_dict(wrapped.state_dict())
        wrapped.load_state_dict(
            alone | {"lm_head.weight": wrapped.lm_head.weight}, strict=False
        )  # as the Trainer saves
        wrapped.load_state_dict(tensors_of(wrapped, "code"), strict=False)
        wrapped.set_streams("default")
        wrapped.load_state_dict(tensors_of(wrapped, "default"), strict=False)
