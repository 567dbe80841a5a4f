"""TRL's trainers on a model with streams: what they learn, against which reference, and resumed after a kill."""

import os
import signal

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import parscale
from parscale.checkpoints.small_model import small_model_path

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

TEMPLATE = """\
{%- for message in messages %}{{- message.role + ': ' }}
{%- if message.role == 'assistant' %}{%- generation %}{{ message.content + eos_token }}{% endgeneration %}
{%- else %}{{- message.content }}{%- endif %}{{- '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{% endif %}"""


def says(role, text):
    return [{"role": role, "content": text}]


TALKS = [("one?", "1"), ("two plus two?", "It is 4."), ("a list?", "items = []"), ("and now?", "return None")]
CHATS = [{"messages": says("user", question) + says("assistant", answer)} for question, answer in TALKS]
PAIRS = [
    {"prompt": says("user", question), "chosen": says("assistant", answer), "rejected": says("assistant", "no idea")}
    for question, answer in TALKS
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(small_model_path())
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make(dropout=0.0):
    """Two streams on the first layer of the small model, which has learned to write."""
    config = AutoConfig.from_pretrained(small_model_path())
    config.num_hidden_layers, config.layer_types, config.attention_dropout = 1, ["full_attention"], dropout
    model = AutoModelForCausalLM.from_pretrained(small_model_path(), config=config, dtype=torch.float32)
    return parscale.wrap(model, 2, prefix_length=4, init="random", seed=0)


def arguments(cls, folder, **changes):
    given = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return cls(str(folder), **given | {"logging_steps": 1, "max_steps": 1, "per_device_train_batch_size": 4} | changes)


def first_loss(tokenizer, folder, **changes):
    settings = arguments(trl.SFTConfig, folder, learning_rate=0.0, **changes)
    data = datasets.Dataset.from_list(CHATS)
    trainer = trl.SFTTrainer(make(), settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def test_packed_chats_have_the_loss_of_chats_apart(tokenizer, tmp_path):
    """Of the assistant's tokens alone; with streams, each chat sees itself and the prefixes."""
    apart = first_loss(tokenizer, tmp_path, assistant_only_loss=True)
    packed = first_loss(tokenizer, tmp_path, assistant_only_loss=True, packing=True, max_length=128)
    assert packed == pytest.approx(apart, abs=1e-4)
    assert abs(first_loss(tokenizer, tmp_path) - apart) > 0.1


def dpo(model, tokenizer, folder, **changes):
    """Against the backbone below the streams, whose probabilities are computed here."""
    data = datasets.Dataset.from_list(PAIRS)
    settings = arguments(trl.DPOConfig, folder, learning_rate=1e-2, precompute_ref_log_probs=True, **changes)
    with model.use_streams(None):
        return trl.DPOTrainer(model, args=settings, train_dataset=data, eval_dataset=data, processing_class=tokenizer)


def letters(completions, **_):
    return [sum(character.isalpha() for character in text) / max(1, len(text)) for text in completions]


def grpo(model, tokenizer, folder, **changes):
    data = datasets.Dataset.from_dict({"prompt": ["def open_file(", "import os\n", "class Reader:\n", "for name in"]})
    sampling = {"num_generations": 2, "max_completion_length": 6}
    settings = arguments(trl.GRPOConfig, folder, learning_rate=1e-2, **sampling, **changes)
    return trl.GRPOTrainer(model, letters, args=settings, train_dataset=data, processing_class=tokenizer)


def test_the_backbone_below_the_streams_is_a_reference_that_costs_nothing(tokenizer, tmp_path):
    """Computed with the streams off, when the trainer is made: as with the plain model passed as reference."""
    model = make()
    model.freeze_backbone()
    trainer = dpo(model, tokenizer, tmp_path, max_steps=12)
    assert trainer.ref_model is None
    assert model.num_streams == 2
    other = trl.DPOTrainer(
        make(),
        ref_model=parscale.unwrap(make()),
        args=arguments(trl.DPOConfig, tmp_path, precompute_ref_log_probs=True),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert list(trainer.train_dataset[name]) == pytest.approx(list(other.train_dataset[name]), abs=1e-3)

    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    trainer.train()
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved
    assert all("prefix_" in name or "aggregate_layer" in name for name in moved)
    after = trainer.evaluate()
    assert after["eval_rewards/accuracies"] == 1.0
    assert after["eval_rewards/margins"] > trainer.state.log_history[0]["rewards/margins"] + 0.1


RUN = """
import importlib.util
import sys
from transformers import AutoTokenizer, TrainerCallback

specification = importlib.util.spec_from_file_location("trl_training", {tests!r})
tests = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tests)

class Killed(TrainerCallback):
    def on_step_begin(self, args, state, control, **more):
        if state.global_step == 2 and "kill" in sys.argv:
            tests.os.kill(tests.os.getpid(), tests.signal.SIGKILL)

tokenizer = AutoTokenizer.from_pretrained(tests.small_model_path())
tokenizer.chat_template = tests.TEMPLATE
model = tests.make(dropout=0.1)
model.freeze_backbone()
options = dict(max_steps=4, save_strategy="steps", save_steps=1, per_device_train_batch_size=2)
trainer = getattr(tests, sys.argv[1])(model, tokenizer, sys.argv[2], **options)
trainer.add_callback(Killed())
trainer.train(resume_from_checkpoint="resume" in sys.argv)
"""


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("trainer", ["dpo", "grpo"])
def test_killed_and_resumed(trainer, programs, tmp_path):
    """To the last bit, samples included; checkpoints are read by `parscale.load`."""
    code = RUN.format(tests=os.path.abspath(__file__))
    assert programs.run("-c", code, trainer, "whole", cwd=tmp_path).returncode == 0
    assert programs.run("-c", code, trainer, "run", "kill", cwd=tmp_path).returncode == -signal.SIGKILL
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    assert not (tmp_path / "run" / "checkpoint-3").exists()
    resumed = programs.run("-c", code, trainer, "run", "resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    whole, again = (parscale.load(tmp_path / name / "checkpoint-4") for name in ("whole", "run"))
    assert again.num_streams == 2
    assert all(torch.equal(tensor, again.get_parameter(name)) for name, tensor in whole.named_parameters())
    start = parscale.load(tmp_path / "whole" / "checkpoint-1")
    assert any(not torch.equal(tensor, start.get_parameter(name)) for name, tensor in whole.named_parameters())
