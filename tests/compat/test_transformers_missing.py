"""A version of transformers that lacks a private name is refused in a sentence."""

import sys
import types

import pytest
import torch
import transformers

import parscale
from parscale.compat import conversion
from parscale.compat import transformers as compat
from parscale.errors import IncompatibleVersionError


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        ("integrations.flash_attention", "get_target_dtype", lambda: compat.flash_dtype(torch.ones(1), None)),
        ("conversion_mapping", "get_checkpoint_conversion_mapping", lambda: conversion.share_conversion("qwen2", "x")),
        (
            "conversion_mapping",
            "register_checkpoint_conversion_mapping",
            lambda: conversion.share_conversion("mixtral", "x"),
        ),
        ("core_model_loading", "revert_weight_conversion", lambda: conversion.stored_name(None, "x")),
        ("core_model_loading", "WeightConverter", lambda: conversion.spare_from_conversion(bool)),
        ("distributed", "DistributedConfig", lambda: compat.tensor_parallel(1, None)),
        ("integrations.deepspeed", "unset_hf_deepspeed_config", compat.forget_deepspeed),
        (
            "integrations.integration_utils",
            "get_reporting_integration_callbacks",
            lambda: compat.reporting_callbacks(["tensorboard"]),
        ),
    ],
)
def test_a_missing_name_is_refused_in_a_sentence(owner, name, call, monkeypatch):
    module = __import__(f"transformers.{owner}", fromlist=[name])
    stand_in = types.ModuleType(module.__name__)
    vars(stand_in).update({key: value for key, value in vars(module).items() if key not in (name, "__name__")})
    monkeypatch.setitem(sys.modules, module.__name__, stand_in)
    with pytest.raises(IncompatibleVersionError) as caught:
        call()
    installed = transformers.__version__
    assert f"needs transformers.{owner}.{name}, which the installed transformers {installed} does" in str(caught.value)


@pytest.mark.parametrize("name", compat.TRAINER_METHODS)
def test_a_trainer_without_a_method_is_refused(name, monkeypatch):
    monkeypatch.delattr(transformers.Trainer, name)
    with pytest.raises(IncompatibleVersionError, match=rf"Trainer\.{name}, which the installed transformers"):
        compat.require_trainer_methods(transformers.Trainer)


def test_an_auto_class_without_its_table_is_refused():
    with pytest.raises(IncompatibleVersionError, match=r"_model_mapping, which the installed transformers"):
        compat.class_names(type("AutoModelForNothing", (), {"__module__": "transformers.models.auto"}))


def test_a_model_is_left_as_it_was(make, unharmed, monkeypatch):
    """Rules of conversion are asked for at the very end of wrapping."""
    from transformers import conversion_mapping

    model = make("Olmo")
    monkeypatch.setattr(transformers.CONFIG_MAPPING, "_extra_content", {})
    with unharmed(model), monkeypatch.context() as patch:
        patch.delattr(conversion_mapping, "get_checkpoint_conversion_mapping")
        with pytest.raises(IncompatibleVersionError, match="get_checkpoint_conversion_mapping"):
            parscale.wrap(model, 2, prefix_length=3, init="random")
