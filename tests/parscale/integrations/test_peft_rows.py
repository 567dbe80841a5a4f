"""What PEFT counts by row of the batch, on a wrapped model, whose streams are rows too."""

import pytest
import torch
import transformers
from lora_adapters import adapted, lora, train
from model_calls import logits_of
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

import parscale

peft = pytest.importorskip("peft")


@pytest.fixture
def make(zoo):
    """A function that makes the same wrapped model each time."""
    return lambda: parscale.wrap(zoo.FAMILIES["llama"].build("sdpa"), 3, prefix_length=4, init="random", seed=0)


@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "lm_head"]}])
def test_a_batch_of_several_adapters(make, zoo, options):
    tuned, ids = adapted(make(), init_lora_weights=False, **options), zoo.token_ids(rows=4)
    tuned.add_adapter("other", lora(init_lora_weights=False, **options))
    alone = {}
    for name in ("default", "other"):
        tuned.set_adapter(name)
        alone[name] = logits_of(tuned, ids)
    with tuned.disable_adapter():
        alone["__base__"] = logits_of(tuned, ids)
    names = ["other", "default", "__base__", "other"]
    mixed = logits_of(tuned, ids, adapter_names=names)
    for row, name in enumerate(names):
        zoo.close(mixed[row], alone[name][row], 2e-5)


@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "lm_head"]}])
@pytest.mark.parametrize("beams", [1, 2])
def test_writing_with_several_adapters(make, zoo, beams, options):
    tuned, ids = adapted(make(), init_lora_weights=False, **options), zoo.token_ids()
    tuned.add_adapter("other", lora(init_lora_weights=False, **options))
    how = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "attention_mask": torch.ones_like(ids)}
    mixed = tuned.generate(input_ids=ids, adapter_names=["other", "default"], **how)
    for row, name in enumerate(["other", "default"]):
        tuned.set_adapter(name)
        assert torch.equal(tuned.generate(input_ids=ids, **how)[row], mixed[row])


def test_rows_that_would_need_different_streams_are_refused(make, zoo):
    tuned, ids = adapted(make()), zoo.token_ids()
    tuned.add_adapter("other", lora())
    tuned.set_adapter("other")
    train(tuned)
    other = logits_of(tuned, ids)
    with pytest.raises(ValueError, match=r"'default', 'other' have trained different streams.*set_adapter"):
        logits_of(tuned, ids, adapter_names=["default", "other"])
    tuned.set_adapter("default")
    zoo.close(logits_of(tuned, ids, adapter_names=["other", "other"]), other, 2e-5)


def test_invocation_tokens(make, zoo):
    ids = zoo.token_ids(rows=3)
    ids[0, 2:4], ids[1, 5:7] = torch.tensor([90, 91]), torch.tensor([90, 91])  # and none in the last row
    torch.manual_seed(0)
    tuned = adapted(make(), init_lora_weights=False, alora_invocation_tokens=[90, 91])
    together = logits_of(tuned, ids)
    with tuned.disable_adapter():
        off = logits_of(tuned, ids)
    for row, begins in enumerate([2, 5, None]):
        zoo.close(logits_of(tuned, ids[row : row + 1])[0], together[row], 2e-5)
        zoo.close(together[row, :begins], off[row, :begins], 2e-5)
    assert (together[0, 3:] - off[0, 3:]).abs().max() > 1e-3


def test_more_adapters_hook_the_model_around_the_backbone_no_more(zoo):
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(text_config=transformers.LlamaConfig(**zoo.COMMON), vision_config=vision)
    model = parscale.wrap(transformers.LlavaForConditionalGeneration(config), 2, prefix_length=3, init="random", seed=0)
    around = [module for module in model.modules() if model.parscale.backbone in module.children()]

    def hooks():
        return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in around]

    before = hooks()
    tuned = peft.get_peft_model(model, lora(target_modules=["q_proj"]))
    tuned.add_adapter("other", lora(target_modules=["q_proj"]))
    assert hooks() == before
    assert sum(before) > 0


def test_prefix_tuning_writes_what_it_reads(make, zoo):
    ids, config = zoo.token_ids(), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    how = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):  # it gives `generate` the prefix under a cache's old name
        plain = zoo.FAMILIES["llama"].build("sdpa")
        expected = plain.generate(**how)
        assert torch.equal(peft.get_peft_model(plain, config).eval().generate(**how), expected)
        pytest.skip(f"transformers asks for PEFT {MIN_PEFT_VERSION}; an older one writes without its prefix")
    tuned = peft.get_peft_model(make(), config).eval()
    written = tuned.generate(**how)
    logits = logits_of(tuned, written[:, :-1], attention_mask=torch.ones_like(written[:, :-1]))
    assert torch.equal(logits[:, -4:].argmax(-1), written[:, -4:])


def test_prefix_tuning_of_streams_that_share_keys(zoo):
    """Streams that differ by nothing yet: what the plain backbone gives with the same prefix."""

    def logits(model):
        torch.manual_seed(0)
        tuned = peft.get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")).eval()
        return logits_of(tuned, zoo.token_ids(), attention_mask=torch.ones(zoo.B, zoo.S, dtype=torch.long))

    build = zoo.FAMILIES["llama"].build
    model = parscale.wrap(build("sdpa"), 3, transform="lora", rank=2, kv="shared", seed=0)
    zoo.close(logits(model), logits(build("sdpa")), 2e-5)
