"""Pretrain the small language model that the package ships, on the source of Python's standard library.

Trains a byte-level BPE tokenizer and a Qwen2 model of 3.3 million parameters from nothing, for as many minutes as it
is given: the learning rate falls to zero with the clock, so a slow machine sees fewer tokens and still ends with a
finished model. Needs `parscale[train]`. Started again after an interruption, it goes on from its last checkpoint,
which lies in `OUTPUT-checkpoints`. The shipped model was trained in two such runs, on a busy two-core machine:

    python examples/pretrain_small_model.py --output first --minutes 70 --batch-size 8 --learning-rate 3e-3 --bf16
    python examples/pretrain_small_model.py --start-from first --tests --output small_model --minutes 26 \\
        --batch-size 8 --learning-rate 1e-3 --bf16
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from parscale.checkpoints import Document, pack_documents, standard_library_split

END_OF_TEXT = "<|endoftext|>"
VOCABULARY_SIZE = 3072
SEQUENCE_LENGTH = 512
MAX_LENGTH = 1024


class TimedSchedule(TrainerCallback):
    """Learning-rate factor by the share of the given time that has passed: a short rise, then a straight fall to zero.

    `LambdaLR` saves the attributes of a callable object, so the time already spent survives an interruption.
    """

    def __init__(self, minutes: float, warmup: float = 0.02):
        self.total = 60 * minutes
        self.warmup = warmup
        self.spent = 0.0
        self.last = time.time()

    def __call__(self, step: int) -> float:
        now = time.time()
        self.spent, self.last = self.spent + now - self.last, now
        share = self.spent / self.total
        return max(0.0, min((share + 1e-4) / self.warmup, (1 - share) / (1 - self.warmup)))

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = time.time()  # the time between two runs is not counted

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = self.spent >= self.total


def train_tokenizer(documents: list[Document]) -> Qwen2Tokenizer:
    # Qwen2's own class, since AutoTokenizer takes it for every Qwen2 model, whatever tokenizer.json says.
    tokenizer = Qwen2Tokenizer(eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=MAX_LENGTH)
    return tokenizer.train_new_from_iterator((text for _, text in documents), VOCABULARY_SIZE, show_progress=False)


def new_model(eos_token_id: int) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )
    return Qwen2ForCausalLM(config)


def as_dataset(documents: list[Document], tokenizer: Qwen2Tokenizer) -> Dataset:
    blocks = pack_documents(documents, tokenizer, SEQUENCE_LENGTH).ids.tolist()
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks}).with_format("torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--start-from", type=Path, help="an earlier result, whose training (and tokenizer) goes on")
    parser.add_argument("--tests", action="store_true", help="train on the library's test suites too, if installed")
    parser.add_argument("--minutes", type=float, default=70, help="how long to train")
    parser.add_argument("--batch-size", type=int, default=4, help=f"blocks of {SEQUENCE_LENGTH} tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at its peak")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, faster where the processor knows it")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model, faster; needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    train_documents, held_out_documents = standard_library_split(with_tests=args.tests)
    if args.start_from is None:
        tokenizer = train_tokenizer(train_documents)
        model = new_model(tokenizer.eos_token_id)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.start_from)
        model = Qwen2ForCausalLM.from_pretrained(args.start_from, dtype=torch.float32)
    train_set, held_out_set = as_dataset(train_documents, tokenizer), as_dataset(held_out_documents, tokenizer)
    print(f"training on {len(train_documents)} files, {len(train_set) * SEQUENCE_LENGTH:,} tokens")
    print(f"held out: {len(held_out_documents)} files, {len(held_out_set) * SEQUENCE_LENGTH:,} tokens")

    checkpoints = args.output.with_name(args.output.name + "-checkpoints")
    settings = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=10_000_000,  # the clock ends the run
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(),
        bf16=args.bf16,
        eval_strategy="steps",
        eval_steps=1000,
        save_steps=500,
        save_total_limit=2,
        logging_steps=50,
        disable_tqdm=True,  # a bar towards max_steps would mislead; the log goes on
        report_to="none",
        torch_compile=args.compile,
        seed=args.seed,
    )
    schedule = TimedSchedule(args.minutes)
    trainer = Trainer(model, settings, train_dataset=train_set, eval_dataset=held_out_set, callbacks=[schedule])
    optimizer = trainer.create_optimizer()
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None)

    loss = trainer.evaluate()["eval_loss"]
    model.config.use_cache = True  # the Trainer turns it off
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    summary = {
        "parameters": model.num_parameters(),
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * args.batch_size * SEQUENCE_LENGTH,
        "minutes": schedule.spent / 60,
        "held_out_loss": loss,
        "held_out_perplexity": math.exp(loss),
    }
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
