"""Private names of transformers do what is assumed of them."""

import copy
import inspect
import logging
import pickle
import sys
import types

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

import parscale
from parscale.checkpoints.training.trainer import StreamsTrainer
from parscale.compat import transformers as compat
from parscale.errors import IncompatibleVersionError
from parscale.streams.naming import part_of

# -- attention


def test_functions_that_anybody_registers_are_seen():
    def ours(*args, **kwargs):
        """An attention function."""

    name = "compat_test"
    transformers.AttentionInterface.register(name, ours)
    transformers.AttentionMaskInterface.register(name, ours)
    try:
        assert compat.attention_functions()[name] is ours
        assert compat.mask_functions()[name] is ours
        assert "eager" not in compat.attention_functions()
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


def test_the_implementation_is_the_one_that_was_set(make):
    model = make(attn_implementation="eager")
    assert compat.attn_implementation(model.config) == "eager"
    model.set_attn_implementation("sdpa")
    assert compat.attn_implementation(model.config) == "sdpa"
    compat.use_eager(model.config)
    assert compat.attn_implementation(model.config) == "eager"
    assert compat.attn_implementation(transformers.LlamaConfig()) == "eager"  # nobody chose


class View(compat.ConfigView):
    def implementation(self):
        return f"{self.prefix}{self.backbone._attn_implementation}"


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


def test_where_attention_is_looked_up(make):
    assert compat.looks_up_attention(type(make().model.layers[0].self_attn))
    bloom = transformers.models.bloom.modeling_bloom.BloomAttention
    assert not compat.looks_up_attention(bloom)
    assert compat.eager_attention(bloom) is None
    biases = compat.alibi_function(bloom)(torch.ones(1, 3, dtype=torch.long), 2, dtype=torch.float32)
    slopes = biases.flatten()[1::3]
    torch.testing.assert_close(biases.view(2, 3), slopes[:, None] * torch.arange(3))
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


def test_weights_are_read_by_the_rules_of_another_type():
    from transformers import conversion_mapping

    compat.share_conversion("mixtral", "mixtral_compat_test")
    rules = conversion_mapping.get_checkpoint_conversion_mapping("mixtral_compat_test")
    assert rules
    assert len(rules) == len(conversion_mapping.get_checkpoint_conversion_mapping("mixtral"))
    compat.share_conversion("qwen2", "qwen2_compat_test")
    assert conversion_mapping.get_checkpoint_conversion_mapping("qwen2_compat_test") is None


def test_a_class_is_shown_in_every_object_that_is_the_package(monkeypatch):
    again, server = types.ModuleType("transformers"), types.ModuleType("transformers.cli.serving.model_manager")
    server.transformers = types.ModuleType("transformers")
    monkeypatch.setitem(sys.modules, "transformers", again)
    monkeypatch.setitem(sys.modules, server.__name__, server)
    monkeypatch.setattr(compat.transformers, "CompatTest", None, raising=False)
    monkeypatch.delattr(compat.transformers, "CompatTest")
    compat.show_class("CompatTest", View)
    try:
        assert {package.CompatTest for package in (again, server.transformers, compat.transformers)} == {View}
        compat.show_class("CompatTest", int)
        assert again.CompatTest is View
    finally:
        del compat.transformers.CompatTest


# -- loading


def test_the_name_in_a_file():
    """LLaVA keeps its language model under the name that it had."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.LlamaConfig(vocab_size=32, **sizes).to_dict()
    images = transformers.CLIPVisionConfig(image_size=8, patch_size=4, **sizes).to_dict()
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(text_config=text, vision_config=images))
    layer = "layers.0.self_attn.q_proj.weight"
    assert compat.stored_name(model, f"model.language_model.{layer}") == f"language_model.model.{layer}"


@pytest.fixture
def mismatched(make, tmp_path):
    """A folder whose tensors are of other shapes than its configuration says."""
    make().save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.vocab_size = 40
    config.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("shown", [None, "in a line"])
def test_a_report_is_said_in_another_way(mismatched, caplog, shown):
    tables = []

    def keep(table):
        tables.append(table)
        return shown

    caplog.set_level(logging.WARNING, logger="transformers")  # a command in this process may have quietened it
    logging.getLogger("transformers").propagate = True
    with compat.loading_reports(keep), pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(mismatched)
    assert any("embed_tokens.weight" in table and "MISMATCH" in table for table in tables)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == (
        [shown] if shown else []
    )


def test_a_tolerant_reader_sees_no_rows_of_streams(make, tmp_path, caplog):
    model = parscale.wrap(make(), 2, prefix_length=3, init="random")
    model.save_pretrained(tmp_path)
    caplog.set_level(logging.WARNING, logger="transformers")  # a command in this process may have quietened it
    logging.getLogger("transformers").propagate = True
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert "LOAD REPORT" not in caplog.text


def test_streams_are_reported_by_their_names():
    assert part_of("model.layers.{0, 1}.self_attn.prefix_k") == "transform"  # a row of the report, for all layers
    assert part_of("model.aggregate_layer.{0, 2}.weight") == "aggregator"


def test_a_plan_of_tensor_parallelism():
    config = compat.tensor_parallel(4, {"layers.*.mlp": "colwise"})
    assert (config.tp_size, config.tp_plan) == (4, {"layers.*.mlp": "colwise"})


def test_a_cache_answers_otherwise_until_that_is_taken_back(make, ids):
    """Whoever holds the cache is told the new answer: the model places its next token by it."""
    model, cache = make(), transformers.DynamicCache()
    mask, after = torch.ones(2, 6, dtype=torch.long), {"position_ids": torch.tensor([[9]])}
    with torch.no_grad():
        model(input_ids=ids[:, :5], past_key_values=cache)
        own, moved = (
            model(input_ids=ids[:, 5:], past_key_values=copy.deepcopy(cache), attention_mask=mask, **given).logits
            for given in ({}, after)
        )
        compat.answer_by(cache, {"get_seq_length": lambda layer_idx=0: 9})
        asked = copy.deepcopy(cache)
        assert torch.equal(model(input_ids=ids[:, 5:], past_key_values=asked, attention_mask=mask).logits, moved)
        compat.answer_itself(cache, ["get_seq_length"])
        assert torch.equal(model(input_ids=ids[:, 5:], past_key_values=cache, attention_mask=mask).logits, own)
    assert not torch.equal(own, moved)


def test_layers_of_a_cache_that_carry_a_state():
    from transformers import cache_utils

    assert not compat.carries_state(transformers.DynamicLayer())
    assert compat.carries_state(cache_utils.LinearAttentionLayer())


def test_a_cache_without_such_a_method_is_refused():
    with pytest.raises(IncompatibleVersionError, match=r"DynamicCache\.get_gone, which the installed transformers"):
        compat.answer_by(transformers.DynamicCache(), {"get_gone": len})


# -- generation, adapters, training


def test_generate_asks_for_the_methods_by_these_names(make, ids, monkeypatch):
    model, calls = make(), []

    def reorder(cache, rows):
        calls.append(rows)
        cache.reorder_cache(rows)
        return cache

    monkeypatch.setattr(model, compat.REORDER_CACHE, reorder, raising=False)
    model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=2, max_new_tokens=2, pad_token_id=0)
    assert calls
    assert compat.own_reorder_cache(type(model)) is None


def test_weights_of_drafted_tokens_keep_the_columns_of_a_prefix():
    split = "_split_model_outputs"  # of a prompt of three tokens and two drafted ones, with two columns of a prefix
    weights = torch.randn(1, 4, 5, 7)
    with compat.keeping_columns(2):
        steps = getattr(transformers.generation.utils, split)((), (weights,), 3, 5, is_decoder_attention=True)
        later = getattr(transformers.generation.utils, split)(steps, (weights,), 4, 2, is_decoder_attention=True)
        hidden = getattr(transformers.generation.utils, split)((), (weights,), 3, 5)
    assert torch.equal(steps[0][0], weights[:, :, :3, :5])
    assert [layer.shape[3] for (layer,) in steps] == [5, 6]
    assert later[: len(steps)] == steps
    for step, columns in ((0, 6), (1, 7)):
        assert torch.equal(later[len(steps) + step][0], weights[:, :, step : step + 1, :columns])
    assert torch.equal(hidden[0][0], weights[:, :, :3])
    plain = getattr(transformers.generation.utils, split)((), (weights,), 3, 5, is_decoder_attention=True)
    assert torch.equal(plain[0][0], weights[:, :, :3, :3])


def test_generate_asks_for_the_shape_of_a_static_cache(make, ids, monkeypatch):
    """Where it is given none, the cache takes its number of rows from the first keys."""
    model, calls = make(), []
    monkeypatch.setattr(model, compat.STATIC_CACHE_SHAPE, lambda: calls.append(1))
    monkeypatch.setattr(model, "forward", doubled_rows(model.forward))
    options = {"cache_implementation": "static", "prefill_chunk_size": 4, "disable_compile": True}
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=2,
        return_dict_in_generate=True,
        pad_token_id=0,
        **options,
    )
    assert calls
    assert result.past_key_values.layers[0].keys.shape[0] == 2 * len(ids)


def twice(x):
    """Each row again, also of masks by the kind of layer."""
    if isinstance(x, dict):
        return {name: twice(value) for name, value in x.items()}
    return None if x is None else torch.cat([x, x])


def doubled_rows(forward):
    """A model's forward pass that runs each row twice, as two streams do."""

    def doubled(input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        kwargs["input_ids"], kwargs["position_ids"] = twice(input_ids), twice(position_ids)
        kwargs["attention_mask"] = twice(attention_mask)
        output = forward(**kwargs)
        output.logits = output.logits[: len(input_ids)]
        return output

    doubled.__signature__ = inspect.signature(forward)
    return doubled


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


# -- a version that lacks a name


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        ("integrations.flash_attention", "get_target_dtype", lambda: compat.flash_dtype(torch.ones(1), None)),
        ("conversion_mapping", "get_checkpoint_conversion_mapping", lambda: compat.share_conversion("qwen2", "x")),
        (
            "conversion_mapping",
            "register_checkpoint_conversion_mapping",
            lambda: compat.share_conversion("mixtral", "x"),
        ),
        ("core_model_loading", "revert_weight_conversion", lambda: compat.stored_name(None, "x")),
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


def test_callbacks_of_trackers():
    from transformers.integrations import TensorBoardCallback

    assert compat.reporting_callbacks(["tensorboard"]) == [TensorBoardCallback]
    with pytest.raises(ValueError, match="nowhere is not supported"):
        compat.reporting_callbacks(["nowhere"])
