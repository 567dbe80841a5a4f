"""The reference of TRL's trainers is the model as it was at the first step, streams and all."""

import copy
import warnings

import pytest
import torch
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import parscale
from parscale.checkpoints.small_model import small_model_path

datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")

IDS = torch.tensor([[5, 6, 7, 8]])
PAIRS = datasets.Dataset.from_dict(
    {
        "prompt": ["def f(x):", "for i"] * 4,
        "chosen": [" return x", " in range(3):"] * 4,
        "rejected": [" pass", " ="] * 4,
    }
)
LORA = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(small_model_path())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model of two layers, as saved by whoever trained it."""
    config = AutoConfig.from_pretrained(small_model_path())
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(small_model_path()).save_pretrained(path)
    return path


@pytest.fixture
def make(folder):
    """A function that makes the same wrapped model each time, of streams that matter."""

    def make(wrapped=True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        if not wrapped:
            return model
        parscale.wrap(model, 2, prefix_length=4, init="random", seed=0)
        with torch.no_grad():
            for tensor in model.parscale.tensors(model.parscale.active).values():
                tensor += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        return model

    return make


@torch.no_grad()
def logits_of(model):
    return model(input_ids=IDS).logits


def arguments(cls, folder, **changes):
    return cls(
        str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        **changes,
    )


def dpo(model, folder, tokenizer, **changes):
    return trl.DPOTrainer(
        model, args=arguments(trl.DPOConfig, folder), train_dataset=PAIRS, processing_class=tokenizer, **changes
    )


def kto(model, folder, tokenizer, **changes):
    rows = [
        {"prompt": "def f(x):", "completion": end, "label": label}
        for end, label in ((" return x", True), (" =", False))
    ]
    data = datasets.Dataset.from_list(rows * 4)
    return trl.KTOTrainer(
        model, args=arguments(trl.KTOConfig, folder), train_dataset=data, processing_class=tokenizer, **changes
    )


def lengths(completions, **_):
    return [float(len(completion)) for completion in completions]


def grpo(model, folder, tokenizer, **changes):
    options = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
    return trl.GRPOTrainer(
        model,
        lengths,
        args=arguments(trl.GRPOConfig, folder, **options),
        train_dataset=PAIRS.select_columns(["prompt"]),
        processing_class=tokenizer,
        **changes,
    )


def rloo(model, folder, tokenizer, **changes):
    options = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
    return trl.RLOOTrainer(
        model,
        lengths,
        args=arguments(trl.RLOOConfig, folder, **options),
        train_dataset=PAIRS.select_columns(["prompt"]),
        processing_class=tokenizer,
        **changes,
    )


DISTANCES = {dpo: ("rewards/chosen", "rewards/rejected"), kto: ("rewards/chosen", "kl"), grpo: ("kl",), rloo: ("kl",)}


def by_day(trainers):
    """Of these DPO and GRPO; KTO and RLOO make their references alike, and are for the night."""
    return [pytest.param(each, marks=pytest.mark.nightly) if each in (kto, rloo) else each for each in trainers]


each = pytest.mark.parametrize("trainer_of", by_day(DISTANCES))


def reference_of(trainer):
    """What the reference answers."""
    if trainer.ref_model is not None:
        return logits_of(trainer.ref_model)
    from trl.trainer.utils import use_adapter

    with use_adapter(trainer.model, "ref" if "ref" in trainer.model.peft_config else None):
        return logits_of(trainer.model)


def check(trainer_of, trainer, expected):
    """The reference answers as `expected` before and after training, and the first step has no distance to it."""
    assert torch.equal(reference_of(trainer), expected)
    trainer.train()
    assert torch.equal(reference_of(trainer), expected)
    assert (logits_of(trainer.model) - expected).abs().max() > 1e-3
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    for name in DISTANCES[trainer_of]:
        assert abs(first.get(name, 0.0)) < 1e-6, name
    assert any(name in first for name in DISTANCES[trainer_of])


@each
def test_without_an_adapter_it_is_a_copy(make, tokenizer, tmp_path, trainer_of):
    model = make()
    expected = logits_of(model)
    trainer = trainer_of(model, tmp_path, tokenizer)
    assert trainer.ref_model is not model
    assert not any(p.requires_grad for p in trainer.ref_model.parameters())
    check(trainer_of, trainer, expected)


@each
def test_with_an_adapter_that_the_trainer_adds(make, tokenizer, tmp_path, trainer_of):
    model = make()
    expected = logits_of(model)
    check(trainer_of, trainer_of(model, tmp_path, tokenizer, peft_config=peft.LoraConfig(**LORA)), expected)


# TRL 1.0's KTO switches an adapter off, also one that was trained before.
KEEP_A_SECOND = [trainer for trainer in DISTANCES if trainer is not kto or Version(trl.__version__) >= Version("1.16")]


@pytest.mark.parametrize("trainer_of", by_day(KEEP_A_SECOND))
def test_with_an_adapter_that_is_there(make, tokenizer, tmp_path, trainer_of):
    """Trained already, as its streams are: TRL keeps a second one as the reference."""
    tuned = peft.get_peft_model(make(), peft.LoraConfig(**LORA, init_lora_weights=False))
    with torch.no_grad():
        for tensor in tuned.parameters():
            tensor += 0.01 * tensor.requires_grad
    expected = logits_of(tuned)
    check(trainer_of, trainer_of(tuned, tmp_path, tokenizer), expected)


def test_a_reference_that_is_passed_is_taken(make, tokenizer, tmp_path):
    plain = make(wrapped=False)
    trainer = dpo(make(), tmp_path, tokenizer, ref_model=plain)
    assert trainer.ref_model is plain


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("copied", marks=pytest.mark.nightly),
        "loaded",
        pytest.param("streams only", marks=pytest.mark.nightly),
        "switched off",
        pytest.param("trained before", marks=pytest.mark.nightly),
    ],
)
def test_models_of_other_origins(make, tokenizer, tmp_path, how, folder):
    model = make()
    if how == "copied":
        model = copy.deepcopy(model)
    elif how == "loaded":
        model.save_pretrained(tmp_path / "full")
        model = parscale.load(tmp_path / "full")
    elif how == "streams only":
        model.save_streams(tmp_path / "streams")
        model = parscale.load(tmp_path / "streams")
    elif how == "switched off":
        model.set_streams(None)
    else:
        dpo(model, tmp_path, tokenizer).train()
    model.eval()
    expected = logits_of(model)
    trainer = dpo(model, tmp_path, tokenizer)
    assert torch.equal(reference_of(trainer), expected)
    trainer.train()
    assert torch.equal(reference_of(trainer), expected)
    plain = dpo(make(wrapped=False), tmp_path, tokenizer)
    assert torch.equal(reference_of(plain), logits_of(make(wrapped=False)))


def test_a_reference_of_create_reference_model(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl import create_reference_model
    model = make()
    expected, reference = logits_of(model), create_reference_model(model)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.1
    assert torch.equal(logits_of(reference), expected)


def test_a_model_in_parts_is_refused(make, tokenizer, tmp_path, monkeypatch):
    model = make()
    monkeypatch.setattr("parscale.integrations.trl.is_sharded", lambda model: True)
    with pytest.raises(ValueError, match=r"plain backbone .* without this Qwen2ForCausalLM's streams.*pass ref_model="):
        dpo(model, tmp_path, tokenizer)
