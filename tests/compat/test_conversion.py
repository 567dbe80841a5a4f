"""Rules of transformers that rename, join and split tensors on the way to a file."""

import pytest
import torch
import transformers
from transformers import conversion_mapping, core_model_loading

from parscale.compat import conversion


def test_weights_are_read_by_the_rules_of_another_type():
    conversion.share_conversion("mixtral", "mixtral_compat_test")
    rules = conversion_mapping.get_checkpoint_conversion_mapping("mixtral_compat_test")
    assert rules
    assert len(rules) == len(conversion_mapping.get_checkpoint_conversion_mapping("mixtral"))
    conversion.share_conversion("qwen2", "qwen2_compat_test")
    assert conversion_mapping.get_checkpoint_conversion_mapping("qwen2_compat_test") is None


def test_the_name_in_a_file():
    """LLaVA keeps its language model under the name that it had."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.LlamaConfig(vocab_size=32, **sizes).to_dict()
    images = transformers.CLIPVisionConfig(image_size=8, patch_size=4, **sizes).to_dict()
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(text_config=text, vision_config=images))
    layer = "layers.0.self_attn.q_proj.weight"
    assert conversion.stored_name(model, f"model.language_model.{layer}") == f"language_model.model.{layer}"


@pytest.fixture
def joined():
    """A model whose class saves the projections of queries, keys and values as one tensor, under other names."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.NomicBertModel(transformers.NomicBertConfig(vocab_size=32, **sizes))


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """What a test spares holds for the test alone."""
    rules = core_model_loading.WeightConverter
    monkeypatch.setattr(rules, "rename_source_key", core_model_loading.WeightTransform.rename_source_key)


def test_a_spared_tensor_is_renamed_but_not_joined(joined):
    inside = "layers.0.self_attn.q_proj"
    assert f"{inside}.weight" in joined.state_dict()
    rest = {f"layers.0.self_attn.{other}_proj.weight": torch.ones(16, 16) for other in "kv"}
    tensors = {f"{inside}.weight": torch.zeros(16, 16), f"{inside}.own": torch.full((2,), 7.0), **rest}
    conversion.spare_from_conversion(lambda name: name.endswith(".own"))
    files = core_model_loading.revert_weight_conversion(joined, tensors)
    stored = conversion.stored_name(joined, f"{inside}.own")
    assert stored == "encoder.layers.0.self_attn.q_proj.own"
    assert files.pop(stored).tolist() == [7.0, 7.0]
    assert {name: weight.shape for name, weight in files.items()} == {"encoder.layers.0.attn.Wqkv.weight": (48, 16)}
