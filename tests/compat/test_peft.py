"""PEFT has the methods that parscale extends; a version without one is refused when an adapter comes, not before."""

import inspect
import sys

import pytest
import torch

import parscale
from parscale.compat import peft as compat
from parscale.errors import IncompatibleVersionError
from parscale.integrations.peft import FUNCTIONS, METHODS

peft = pytest.importorskip("peft")


def original(function):
    """What PEFT itself defines."""
    return inspect.unwrap(function, stop=lambda each: not hasattr(each, "extended_by_parscale"))


@pytest.mark.parametrize(("owner", "name"), METHODS)
def test_a_method_takes_what_the_extension_hands_on(owner, name):
    cls = compat.tuner_class() if owner == compat.TUNER else getattr(peft, owner)
    theirs = list(inspect.signature(original(getattr(cls, name))).parameters.values())
    positional = [each for each in theirs if each.kind is each.POSITIONAL_OR_KEYWORD]
    takes_more = any(each.kind is each.VAR_POSITIONAL for each in theirs)
    _, *ours = inspect.signature(METHODS[owner, name]).parameters.values()  # the first is the method itself
    named = [each.name for each in ours if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert len(named) <= len(positional) or takes_more
    # by their names where these matter: a caller may write adapter_name=...
    if not takes_more:
        assert named == [each.name for each in positional[: len(named)]]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_there_under_its_name(name):
    function = getattr(compat.owner_of(name), name)
    assert original(function).__name__ == name


def test_the_tuner_is_what_adapters_go_through(make, monkeypatch):
    calls = []
    for name in ("inject_adapter", "set_adapter", "forward"):
        own = getattr(compat.tuner_class(), name)
        monkeypatch.setattr(
            compat.tuner_class(), name, lambda *args, own=own, name=name, **kw: calls.append(name) or own(*args, **kw)
        )
    peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["q_proj"]), make()
    )  # as transformers' add_adapter does
    assert "inject_adapter" in calls
    calls.clear()
    adapted = peft.get_peft_model(make(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted(input_ids=torch.ones(1, 2, dtype=torch.long))
    adapted.set_adapter("default")
    assert {"inject_adapter", "set_adapter", "forward"} <= set(calls)


def test_rows_go_to_layers_through_the_hooks(make, ids, monkeypatch):
    given = []
    own = getattr(peft.PeftModel, compat.ROWS_OF_LAYERS)
    monkeypatch.setattr(
        peft.PeftModel, compat.ROWS_OF_LAYERS, lambda self, *a, **kw: given.append(kw) or own(self, *a, **kw)
    )
    model = peft.get_peft_model(make(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    model(input_ids=ids, adapter_names=["default", "__base__"])
    assert given[0]["adapter_names"] == ["default", "__base__"]


@pytest.fixture
def untouched(monkeypatch):
    """A method and a function of PEFT as they are without parscale."""
    method, function = (original(x) for x in (peft.PeftModel.set_adapter, peft.prepare_model_for_kbit_training))
    monkeypatch.setattr(peft.PeftModel, "set_adapter", method)
    monkeypatch.setattr(peft, "prepare_model_for_kbit_training", function)
    return method, function


def ours(function, *args, **kwargs):
    """In place of what it extends, which is given back."""
    return function


EXTENDED = {(compat.MODEL, "set_adapter"): ours}, {"prepare_model_for_kbit_training": (ours, ["peft.utils"])}


def test_all_are_extended_at_once(untouched):
    method, function = untouched
    modules = {name: vars(sys.modules[name]) for name in ("peft", "peft.utils")}
    compat.extend_all(*EXTENDED, lambda model: True)
    assert peft.PeftModel.set_adapter(None, "default") is method
    assert modules["peft"][function.__name__](None) is function
    assert modules["peft.utils"][function.__name__] is not modules["peft"][function.__name__]  # which keeps its own


def test_none_is_extended_where_one_is_missing(untouched, monkeypatch):
    method, function = untouched
    refused = []
    monkeypatch.setattr(compat, "_refuse_adapters", lambda error, is_wrapped: refused.append(str(error)))
    methods, functions = EXTENDED
    compat.extend_all(methods | {(compat.MODEL, "gone"): ours}, functions, lambda model: True)
    assert peft.PeftModel.set_adapter is method
    assert peft.prepare_model_for_kbit_training is function
    assert ["PeftModel.gone, which the installed peft" in message for message in refused] == [True]


# -- a version that lacks a name


MISSING = [
    (lambda: compat.tuner_class(), "disable_adapter_layers"),
    (lambda: peft.PeftModel, compat.ROWS_OF_LAYERS),
    (lambda: peft, "prepare_model_for_kbit_training"),
    (lambda: sys.modules["peft.tuners.tuners_utils"], compat.TUNER),
]


@pytest.fixture(params=MISSING, ids=[name for _, name in MISSING])
def renamed(request, monkeypatch):
    """PEFT as it is without parscale, and without one of its names, which is given."""
    for cls, method in METHODS:
        holder = compat.tuner_class() if cls == compat.TUNER else getattr(peft, cls)
        if method in vars(holder):
            monkeypatch.setattr(holder, method, original(vars(holder)[method]))
    owner, name = request.param
    monkeypatch.delattr(owner(), name)
    return name


def test_wrapping_needs_no_adapters(make, ids, renamed):
    model = parscale.wrap(make(), 2, prefix_length=3, init="random")
    model(input_ids=ids)
    parscale.unwrap(model)
    assert torch.equal(model(input_ids=ids).logits, make()(input_ids=ids).logits)


def test_an_adapter_for_streams_is_refused_in_a_sentence(make, unharmed, renamed):
    model, config = parscale.wrap(make(), 2, prefix_length=3, init="random"), peft.LoraConfig(target_modules=["q_proj"])
    sentence = rf"parscale needs peft\S*\.{renamed}, which the installed peft {peft.__version__} does not have"
    with unharmed(model), pytest.raises(IncompatibleVersionError, match=sentence):
        peft.get_peft_model(model, config)


@pytest.mark.parametrize("renamed", MISSING[:3], ids=[name for _, name in MISSING[:3]], indirect=True)
def test_an_adapter_for_a_plain_model_is_left_alone(make, ids, renamed):
    parscale.wrap(make(), 2, prefix_length=3, init="random")
    adapted = peft.get_peft_model(make(), peft.LoraConfig(target_modules=["q_proj"]))
    assert adapted(input_ids=ids).logits.shape == (2, 6, 32)


def test_a_peft_that_cannot_be_imported_is_none(make, monkeypatch):
    """As one that does not go with the installed transformers."""
    monkeypatch.setitem(sys.modules, "peft", None)
    model = parscale.wrap(make(), 2, prefix_length=3, init="random")
    assert model.num_streams == 2
