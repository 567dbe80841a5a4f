"""Private names of transformers around models and their classes: experts, checkpointing, auto classes, conversion."""

import sys
import types

import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from parscale.compat import transformers as compat

# -- parts of a model


def test_experts_take_the_form_without_data_dependence_for_a_block(make, ids):
    model = make("Mixtral", num_local_experts=2)
    own = model.config._experts_implementation
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with compat.experts_without_data_dependence(model.config):
            assert model.config._experts_implementation == "batched_mm"
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert model.config._experts_implementation == own
    with compat.experts_without_data_dependence(types.SimpleNamespace()):
        pass


def test_a_layer_is_computed_again_by_the_function_in_its_place(make, ids):
    model, calls = make().train(), []
    layer = model.model.layers[0]
    model.gradient_checkpointing_enable()
    own = compat.checkpointing_function(layer)

    def counted(function, *args, **kwargs):
        calls.append(function)
        return own(function, *args, **kwargs)

    compat.set_checkpointing_function(layer, counted)
    model(input_ids=ids).logits.sum().backward()
    assert len(calls) == 1
    assert compat.checkpointing_function(make().model.layers[0]) is None


def test_models_have_an_attribute_that_is_computed(make):
    name = "compat_test_attribute"
    try:
        for value in (1, 2):
            compat.show_on_models(name, property(lambda model, value=value: value))
        assert getattr(make(), name) == 1  # once
    finally:
        delattr(PreTrainedModel, name)


# -- auto classes


def test_auto_classes_and_what_they_make():
    found = compat.auto_classes()
    assert found["AutoModelForCausalLM"] is AutoModelForCausalLM
    assert "AutoConfig" not in found
    assert compat.model_mapping(AutoModelForCausalLM)[transformers.LlamaConfig] is transformers.LlamaForCausalLM
    assert compat.model_mapping(transformers.LlamaForCausalLM) is None
    assert {"LlamaModel", "BertModel"} <= set(compat.class_names(AutoModel))


def test_the_mark_of_an_auto_class_is_taken_out():
    assert compat.without_own_arguments({"_from_auto": True, "revision": "main"}) == {"revision": "main"}


class Shown:
    """A class for everyone to import."""


def test_a_class_is_shown_in_every_object_that_is_the_package(monkeypatch):
    again, server = types.ModuleType("transformers"), types.ModuleType("transformers.cli.serving.model_manager")
    server.transformers = types.ModuleType("transformers")
    monkeypatch.setitem(sys.modules, "transformers", again)
    monkeypatch.setitem(sys.modules, server.__name__, server)
    monkeypatch.setattr(compat.transformers, "CompatTest", None, raising=False)
    monkeypatch.delattr(compat.transformers, "CompatTest")
    compat.show_class("CompatTest", Shown)
    try:
        assert {package.CompatTest for package in (again, server.transformers, compat.transformers)} == {Shown}
        compat.show_class("CompatTest", int)
        assert again.CompatTest is Shown
    finally:
        del compat.transformers.CompatTest
