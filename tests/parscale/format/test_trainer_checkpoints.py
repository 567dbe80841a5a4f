"""Folders that the Trainer, PEFT, tokenizers and pipelines write and read beside the streams."""

import pytest
import torch
import transformers
from model_calls import exact_logits_of
from peft_versions import peft_for_add_adapter
from transformers import AutoConfig, Trainer, TrainingArguments

from parscale import load


@pytest.mark.grid
@pytest.mark.parametrize("shards", [None, "100KB"], ids=["single", "shards"])
@pytest.mark.parametrize("active", ["default", "code"])
def test_the_trainer_loads_back_what_it_saved(wrapped, zoo, active, shards, tmp_path, monkeypatch):
    """The best checkpoint at the end, and a checkpoint to resume from, with the set that trains under its own name."""
    if shards:
        save = transformers.PreTrainedModel.save_pretrained
        monkeypatch.setattr(
            transformers.PreTrainedModel,
            "save_pretrained",
            lambda self, folder, **kwargs: save(self, folder, **kwargs | {"max_shard_size": shards}),
        )
    data = [{"input_ids": row, "labels": row} for row in torch.randint(3, 90, (8, 6))]

    def trainer(model, **options):
        model.set_streams(active)
        arguments = TrainingArguments(
            output_dir=tmp_path / "run",
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=0.05,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
            **options,
        )
        return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)

    wrapped.save_pretrained(tmp_path / "start")
    first = trainer(
        wrapped,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the best is not the last
    )
    first.train()
    best, last = (load(tmp_path / "run" / f"checkpoint-{step}") for step in (2, 4))
    assert first.state.best_model_checkpoint.endswith("checkpoint-2")
    assert not torch.equal(exact_logits_of(best), exact_logits_of(last))
    assert torch.equal(exact_logits_of(wrapped), exact_logits_of(best))

    resumed = load(tmp_path / "start")
    trainer(resumed, save_strategy="no").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(exact_logits_of(resumed), exact_logits_of(last))


def test_streams_beside_an_adapter(wrapped, tiny, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(wrapped, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    wrapped.save_streams(tmp_path)
    loaded = peft.PeftModel.from_pretrained(load(tmp_path, backbone=tiny()), tmp_path)
    assert torch.equal(exact_logits_of(loaded), exact_logits_of(adapted))


def test_adapters_that_the_class_itself_holds(wrapped, tiny, tmp_path):
    """Then the class's own save_pretrained writes the adapter alone; the streams lie beside it."""
    peft = peft_for_add_adapter(tiny())
    wrapped.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    loaded = load(tmp_path, backbone=tiny())
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(exact_logits_of(loaded), exact_logits_of(wrapped))


def test_configuration_and_tokenizer_beside_it_are_found(wrapped, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"a": 3, "b": 4, "[UNK]": 0}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    wrapped.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).parscale_n == 4
    generator = transformers.pipeline("text-generation", model=str(tmp_path))
    assert generator.model.num_streams == 4
    assert generator.tokenizer("a b a")["input_ids"] == [3, 4, 3]
    assert generator("a b", max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith("a b")
