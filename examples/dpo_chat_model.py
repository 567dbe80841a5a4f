"""Teach the streams of a frozen chat model which of two answers is better, with TRL's DPOTrainer.

The reference is the plain backbone below the streams. Its probabilities are computed once, with the streams off, and no
second model is loaded. Needs TRL (`pip install trl`).

    python examples/dpo_chat_model.py --model Qwen/Qwen2.5-0.5B-Instruct --steps 200 --output preferring
    python examples/dpo_chat_model.py --model Qwen/Qwen2.5-0.5B-Instruct --steps 200 --output preferring --resume
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from parscale import load, wrap
from parscale.checkpoints import small_model_path

CHAT_TEMPLATE = """\
{%- for message in messages %}{{ message.role + ': ' + message.content + eos_token + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{% endif %}"""

ANSWERS = {  # what is preferred, and what is not
    "How do I open a file?": ('with open(path, encoding="utf-8") as file:', "file = open(path)"),
    "How do I sort a list?": ("result = sorted(values)", "values.sort(cmp)"),
    "How do I join paths?": ("path = os.path.join(folder, name)", 'path = folder + "/" + name'),
    "How do I raise an error?": ('raise ValueError("no such name")', 'raise "no such name"'),
    "How do I loop over items?": ("for key, value in table.items():", "for key in table.keys():"),
    "How do I make a set?": ("names = set()", "names = {}"),
}


def pair(question: str, chosen: str, rejected: str) -> dict:
    def says(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    return {
        "prompt": says("user", question),
        "chosen": says("assistant", chosen),
        "rejected": says("assistant", rejected),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(small_model_path()))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", help="folder for the run and its checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    model = wrap(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), num_streams=4, seed=0)
    model.freeze_backbone()
    model.print_trainable_parameters()
    pairs = Dataset.from_list([pair(question, *answers) for question, answers in ANSWERS.items()])

    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=args.output or folder,
            max_steps=args.steps,
            per_device_train_batch_size=3,
            learning_rate=1e-2,
            precompute_ref_log_probs=True,
            save_steps=max(1, args.steps // 2),
            save_strategy="steps" if args.output else "no",
            logging_steps=5,
            bf16=torch.cuda.is_available(),
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        with model.use_streams(None):  # what the trainer computes when it is made is the backbone's
            trainer = DPOTrainer(
                model, args=settings, train_dataset=pairs, eval_dataset=pairs, processing_class=tokenizer
            )
        before = trainer.evaluate()["eval_rewards/accuracies"]
        trainer.train(resume_from_checkpoint=args.resume)
        after = trainer.evaluate()["eval_rewards/accuracies"]
        print(f"preferred answers told apart: {before:.0%}, at the end {after:.0%}")
        if args.output:
            last = Path(args.output) / f"checkpoint-{args.steps}"
            print(f"load({str(last)!r}) has {load(last).num_streams} streams")


if __name__ == "__main__":
    main()
