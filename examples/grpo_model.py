"""Reinforce what a model with streams writes by a reward, with TRL's GRPOTrainer.

The reward here is the share of a completion that is letters. Only the streams train. transformers generates the
samples, or vLLM with parscale's plugin, to which TRL sends the new weights after each step. Needs TRL (`pip install
trl`), and vLLM for `--vllm`.

    python examples/grpo_model.py --steps 20
    python examples/grpo_model.py --steps 20 --vllm
    python examples/grpo_model.py --steps 20 --output reinforced
    python examples/grpo_model.py --steps 20 --output reinforced --resume
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from parscale import load, wrap
from parscale.checkpoints import small_model_path

PROMPTS = ["def open_file(", "import os\n", "class Reader:\n", "for name in names:\n"]


def letters(completions: list[str], **_: object) -> list[float]:
    return [sum(character.isalpha() for character in text) / max(1, len(text)) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(small_model_path()))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--vllm", action="store_true", help="sample with vLLM, on the same device as the training")
    parser.add_argument("--output", help="folder for the run and its checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = wrap(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), num_streams=4, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        if args.vllm:  # it starts from the folder that the model was loaded from
            model.save_pretrained(f"{folder}/start")
            tokenizer.save_pretrained(f"{folder}/start")
            model = load(f"{folder}/start")
        model.freeze_backbone()
        settings = GRPOConfig(
            output_dir=args.output or folder,
            max_steps=args.steps,
            per_device_train_batch_size=16,
            num_generations=4,
            max_completion_length=args.max_new_tokens,
            learning_rate=3e-2,
            logging_steps=1,
            save_steps=max(1, args.steps // 2),
            save_strategy="steps" if args.output else "no",
            use_vllm=args.vllm,
            vllm_mode="colocate",
            vllm_max_model_length=64 + args.max_new_tokens,
            bf16=torch.cuda.is_available(),
            report_to="none",
            seed=0,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        prompts = Dataset.from_dict({"prompt": PROMPTS})
        trainer = GRPOTrainer(model, letters, args=settings, train_dataset=prompts, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=args.resume)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    first, last = (sum(some) / len(some) for some in (rewards[:3], rewards[-3:]))
    print(f"{type(model).__name__} with {model.num_streams} streams: reward {first:.2f}, at the end {last:.2f}")
    if args.output:
        checkpoint = Path(args.output) / f"checkpoint-{args.steps}"
        print(f"load({str(checkpoint)!r}) has {load(checkpoint).num_streams} streams")


if __name__ == "__main__":
    main()
