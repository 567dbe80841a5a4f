"""Private names of transformers around adapters and its Trainer."""

import types

import pytest
import transformers

from parscale.checkpoints.training.trainer import StreamsTrainer
from parscale.compat import transformers as compat


def test_a_model_counts_as_adapted_for_a_block(make):
    model = make()
    assert not compat.has_adapter(model)
    with compat.counted_as_adapted(model):
        assert compat.has_adapter(model)
    assert not compat.has_adapter(model)


def test_the_trainer_takes_a_quantized_model_that_counts_as_adapted(make, monkeypatch):
    from transformers import trainer_utils

    model = make()
    monkeypatch.setattr(model, "is_quantized", True, raising=False)
    monkeypatch.setattr(model, "hf_quantizer", types.SimpleNamespace(is_trainable=True), raising=False)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer_utils.validate_quantization_for_training(model)
    with compat.counted_as_adapted(model):
        trainer_utils.validate_quantization_for_training(model)


def test_an_adapter_of_the_models_own_is_seen(make):
    peft = pytest.importorskip("peft")
    model = make()
    try:
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    except ValueError as error:
        if "PEFT you are using is not compatible" not in str(error):
            raise
        pytest.skip(str(error))
    assert compat.has_adapter(model)


def test_the_trainer_has_the_methods_that_ours_overrides():
    compat.require_trainer_methods(transformers.Trainer)
    own = {name for name in vars(StreamsTrainer) if name.startswith("_") and not name.startswith("__")}
    assert own & set(dir(transformers.Trainer)) - {"_save_checkpoint"} <= set(compat.TRAINER_METHODS)
    assert set(compat.TRAINER_METHODS) <= own


def test_deepspeeds_configuration_is_forgotten():
    from transformers.integrations import deepspeed

    class Settings:
        def is_zero3(self):
            return True

    settings = Settings()  # held weakly
    deepspeed.set_hf_deepspeed_config(settings)
    compat.forget_deepspeed()
    assert deepspeed._hf_deepspeed_config_weak_ref is None


def test_callbacks_of_trackers():
    from transformers.integrations import TensorBoardCallback

    assert compat.reporting_callbacks(["tensorboard"]) == [TensorBoardCallback]
    with pytest.raises(ValueError, match="nowhere is not supported"):
        compat.reporting_callbacks(["nowhere"])
