"""Private names of transformers around attention: registered functions, the chosen implementation, layers' own code."""

import contextlib
import copy
import pickle
from unittest.mock import Mock

import pytest
import torch
import transformers

from parscale.compat import flash
from parscale.compat import transformers as compat
from parscale.errors import IncompatibleVersionError


@pytest.fixture
def bloom():
    """A layer without the table of all models, whose file makes distance biases."""
    return transformers.models.bloom.modeling_bloom.BloomAttention


def test_functions_that_anybody_registers_are_seen():
    def ours(*args, **kwargs):
        """An attention function."""

    name = "compat_test"
    transformers.AttentionInterface.register(name, ours)
    transformers.AttentionMaskInterface.register(name, ours)
    try:
        assert compat.ATTENTION_FUNCTIONS[name] is ours
        assert compat.MASK_FUNCTIONS[name] is ours
        assert "eager" not in compat.ATTENTION_FUNCTIONS
    finally:
        for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
            interface._global_mapping.pop(name)


def test_flash_attention_is_told_by_its_mask():
    flash = transformers.AttentionMaskInterface()["flash_attention_2"]
    transformers.AttentionMaskInterface.register("org/kernel", flash)
    try:
        found = [name for name in ("sdpa", "eager", "flash_attention_3", "org/kernel", "new") if compat.is_flash(name)]
        assert found == ["flash_attention_3", "org/kernel"]
    finally:
        transformers.AttentionMaskInterface._global_mapping.pop("org/kernel")


def implementations(model):
    parts = (model, model.text_model, model.vision_model, model.text_model.encoder.layers[0].self_attn)
    return [part.config._attn_implementation for part in parts]


def test_flash_attention_is_replaced_for_a_block_in_each_part_that_names_it():
    """Also where layers see a view of their configuration, and after an error."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=sizes | {"vocab_size": 8}, vision_config=sizes | {"image_size": 8, "patch_size": 4}
    )
    model = transformers.CLIPModel(config)
    layer = model.text_model.encoder.layers[0].self_attn
    layer.config = View(layer.config, prefix="seen as ")
    model.config._attn_implementation_internal = None
    model.vision_model.config._attn_implementation = "sdpa"
    model.text_model.config._attn_implementation = "flash_attention_3"
    before = implementations(model)
    assert before == [None, "flash_attention_3", "sdpa", "seen as flash_attention_3"]
    for device, name in (("cpu", "flash_attention_in_torch"), ("meta", "eager")):
        with contextlib.suppress(ValueError), flash.flash_in_torch(model, torch.device(device)):
            assert implementations(model) == [None, name, "sdpa", f"seen as {name}"]
            raise ValueError
        assert implementations(model) == before
    assert compat.is_flash("flash_attention_in_torch")


@pytest.mark.parametrize(
    ("device", "dtypes", "unfit"),
    [
        ("cpu", ["bfloat16"], True),
        ("meta", ["bfloat16"], True),
        ("cuda", ["float32"], True),
        ("cuda", ["float32", "float32"], True),
        ("cuda", ["bfloat16", "float32"], False),  # streams, routers and norms may be in float32
        ("cuda", ["float32", "uint8"], False),  # quantized, as it is made ready for training
        ("cuda", ["float16"], False),
    ],
)
def test_flash_attention_runs_on_a_gpu_in_half_precision(device, dtypes, unfit, make, monkeypatch):
    weights, place = [Mock(dtype=getattr(torch, dtype)) for dtype in dtypes], torch.device(device)
    model = make()
    monkeypatch.setattr(model, "parameters", lambda: iter(weights))
    assert not flash.flash_cannot_run(model, place)
    model.config._attn_implementation = "flash_attention_2"
    assert flash.flash_cannot_run(model, place) is unfit


def test_the_implementation_is_the_one_that_was_set(make):
    model = make(attn_implementation="eager")
    assert compat.attn_implementation(model.config) == "eager"
    model.set_attn_implementation("sdpa")
    assert compat.attn_implementation(model.config) == "sdpa"
    compat.use_eager(model.config)
    assert compat.attn_implementation(model.config) == "eager"
    assert compat.attn_implementation(transformers.LlamaConfig()) == "eager"  # nobody chose


def test_a_configuration_that_names_its_implementation_elsewhere_is_refused():
    config = type("LlamaConfig", (), {"__module__": "transformers"})()
    with pytest.raises(IncompatibleVersionError, match=r"LlamaConfig\._attn_implementation, which the installed trans"):
        compat.attn_implementation(config)


class View(compat.ConfigView):
    def implementation(self):
        return f"{self.prefix}{self.original._attn_implementation}"


def test_a_view_answers_another_implementation_and_nothing_else(make, ids):
    """The name that a layer looks up is the view's."""
    model = make(attn_implementation="eager")
    attention, seen = model.model.layers[0].self_attn, []

    def spy(module, query, key, value, mask, **kwargs):
        seen.append(module)
        return value.repeat_interleave(2, dim=1).transpose(1, 2), None

    transformers.AttentionInterface.register("spy_eager", spy)
    try:
        attention.config = View(attention.config, prefix="spy_")
        model(input_ids=ids)
    finally:
        transformers.AttentionInterface._global_mapping.pop("spy_eager")
    assert seen == [attention]
    view = attention.config
    view.hidden_size = 5
    assert (model.config.hidden_size, view.num_attention_heads) == (5, model.config.num_attention_heads)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda view: pickle.loads(pickle.dumps(view))])
def test_a_view_is_copied_with_what_it_views(copied):
    view = copied(View(transformers.LlamaConfig(attn_implementation="eager", vocab_size=7), prefix="x"))
    assert (type(view), view._attn_implementation, view.vocab_size) == (View, "xeager", 7)


def test_where_attention_is_looked_up(make, bloom):
    assert compat.looks_up_attention(type(make().model.layers[0].self_attn))
    assert not compat.looks_up_attention(bloom)


def test_a_file_without_an_eager_function(bloom):
    assert compat.eager_attention(bloom) is None


def test_distance_biases_grow_with_the_position(bloom):
    biases = compat.alibi_function(bloom)(torch.ones(1, 3, dtype=torch.long), 2, dtype=torch.float32)
    slopes = biases.flatten()[1::3]
    torch.testing.assert_close(biases.view(2, 3), slopes[:, None] * torch.arange(3))


def test_a_layer_without_distance_biases_is_refused(make):
    with pytest.raises(IncompatibleVersionError, match="build_alibi_tensor, which the installed transformers"):
        compat.alibi_function(type(make().model.layers[0].self_attn))


def test_the_eager_function_is_that_of_the_layers_file():
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.llama import modeling_llama

    found = map(compat.eager_attention, (modeling_gemma2.Gemma2Attention, modeling_llama.LlamaAttention))
    assert list(found) == [modeling_gemma2.eager_attention_forward, modeling_llama.eager_attention_forward]
    assert modeling_gemma2.eager_attention_forward is not modeling_llama.eager_attention_forward


class ByName:
    def forward(self):
        # a comment about self.config._attn_implementation == "sdpa"
        return self.config._attn_implementation in ("eager", "sdpa")


class ByEager:
    def forward(self):
        """A string about self.config._attn_implementation in ("eager", "sdpa")."""
        return self.config._attn_implementation == "eager"


class Inherits(ByName):
    def reset(self):
        """Nothing."""


def test_a_layer_that_compares_names():
    assert compat.compares_implementation(ByName)
    assert compat.compares_implementation(Inherits)
    assert not compat.compares_implementation(ByEager)
    assert not compat.compares_implementation(type("Typed", (), {}))


def test_layers_of_transformers_that_compare_names():
    """Of those that the tests know; a new one gets both names by itself, and is for the table of architectures."""
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
    from transformers.models.llama.modeling_llama import LlamaAttention

    assert compat.compares_implementation(DeepseekV32Attention)
    assert not compat.compares_implementation(GPT2Attention)
    assert not compat.compares_implementation(LlamaAttention)


def test_the_dtype_of_flash_attention(make):
    model = make().half()
    layer = model.model.layers[0].self_attn
    assert compat.flash_dtype(torch.ones(1), layer) == torch.float16
    assert compat.flash_dtype(torch.ones(1, dtype=torch.bfloat16), layer) == torch.bfloat16
