"""Train the streams of a frozen backbone with the Hugging Face Trainer, and save them.

The text is the source of numpy, which the small model has not seen. Prefixes want a far higher learning rate than
weights do, and the aggregator's are weights.

    python examples/train_with_trainer.py --steps 200 --output trained
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from parscale import load, wrap
from parscale.checkpoints import pack_documents, package_source_split, small_model_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(small_model_path()))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--files", type=int, default=20, help="how many files of numpy to train on")
    parser.add_argument("--output", help="folder for the trained model")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    blocks = pack_documents(package_source_split(["numpy"])[0][: args.files], tokenizer, args.sequence_length)
    model = wrap(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), num_streams=4, seed=0)
    model.freeze_backbone()  # to train everything, leave this line out, and give the backbone a rate below
    model.print_trainable_parameters()
    aggregator = [parameter for name, parameter in model.named_parameters() if "aggregate_layer" in name]
    prefixes = [parameter for parameter in model.stream_parameters() if parameter not in set(aggregator)]
    rates = [{"params": prefixes, "lr": 3e-2}, {"params": aggregator, "lr": 1e-3}]

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=4,  # with flash-attention 1: in more rows, packed documents see each other
            warmup_steps=2,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        optimizer = torch.optim.AdamW(rates, weight_decay=0.0)
        Trainer(model, settings, train_dataset=blocks, optimizers=(optimizer, None)).train()

    if args.output:
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
        print(f"load({args.output!r}) has {load(args.output).num_streams} streams")


if __name__ == "__main__":
    main()
