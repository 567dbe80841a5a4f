"""Low-rank streams that a term of the loss keeps apart, after ND-LoRA (arXiv 2510.20690): a loss of your own.

The term is that of Barlow Twins (arXiv 2103.03230) between the states of two streams behind one layer, as ND-LoRA's
code has it: over tokens, each feature of one stream is to correlate with itself in the other, and with no other
feature. Its scale is found in the first steps. Low-rank matrices stand on the queries, keys and values of some layers.

    python examples/nd_lora.py --steps 100 --output apart

The paper's run, without the prefix of 48 tokens that each stream has there too, and on other text than the Pile:

    python examples/nd_lora.py --model Qwen/Qwen2.5-0.5B --first-layer 12 --last-layer 20 --sequence-length 976 \\
        --batch-size 4 --accumulation 16 --steps 320 --learning-rate 3e-4 --output nd-lora
"""

from __future__ import annotations

import argparse
import re
import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from parscale import load, wrap
from parscale.checkpoints import pack_documents, package_source_split, small_model_path

P = 4
WEIGHT = 0.58  # of the term, with P = 4
START = 20.0  # what the term is scaled to


def barlow_twins(states: torch.Tensor) -> torch.Tensor:
    """The mean over pairs of streams of the distance between their cross-correlation and the identity.

    Args:
        states: of P streams, stream-major, `(P*B, S, H)`.

    Returns:
        A number of at least 0.
    """
    by_stream = states.float().unflatten(0, (P, -1)).flatten(1, 2)  # (P, B*S, H)
    normal = (by_stream - by_stream.mean(1, keepdim=True)) / (by_stream.std(1, correction=0, keepdim=True) + 1e-6)
    first, second = torch.triu_indices(P, P, offset=1)  # (pairs,) each
    correlation = normal[first].mT @ normal[second] / normal.shape[1]  # (pairs, H, H)
    return torch.linalg.matrix_norm(correlation - torch.eye(correlation.shape[-1], device=states.device)).mean()


class ApartTrainer(Trainer):
    """A Trainer whose loss has the term.

    Args:
        model: with streams.
        args: of the Trainer; in its warm-up the term grows from nothing, and its scale is found.
        layer: behind which streams are kept apart.
        **kwargs: of the Trainer.
    """

    def __init__(self, model: Any, args: TrainingArguments, *, layer: torch.nn.Module, **kwargs: Any) -> None:
        super().__init__(model, args, **kwargs)
        self.scale: torch.Tensor | None = None
        layer.register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self.states = output[0] if isinstance(output, tuple) else output  # (P*B, S, H)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            term, grown = barlow_twins(self.states), min(1.0, self.state.global_step / self.args.warmup_steps)
            if self.scale is None or grown < 1:
                mean = term.detach()
                self.scale = mean if self.scale is None else 0.9 * self.scale + 0.1 * mean
            loss = loss + WEIGHT * grown * START * term / self.scale / self.args.gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(small_model_path()))
    parser.add_argument("--first-layer", type=int, default=1)
    parser.add_argument("--last-layer", type=int, default=2, help="the term is measured behind it")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1, help="batches in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--output", help="folder for the trained model")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    documents, _ = package_source_split(["numpy"])  # text that the small model has not seen
    blocks = pack_documents(documents, tokenizer, args.sequence_length)
    model = wrap(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), P, transform="lora", rank=16)
    model.freeze_backbone()
    layers = "|".join(map(str, range(args.first_layer, args.last_layer + 1)))
    for name, parameter in model.named_parameters():  # elsewhere the streams' differences stay zero
        if "stream_" in name and not re.search(rf"\.({layers})\.self_attn\.[qkv]_proj\.", name):
            parameter.requires_grad_(False)
    model.print_trainable_parameters()

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.accumulation,
            learning_rate=args.learning_rate,
            warmup_steps=max(1, args.steps // 50),
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = ApartTrainer(model, settings, layer=model.model.layers[args.last_layer], train_dataset=blocks)
        trainer.train()
    batch = torch.from_numpy(blocks.ids[:8]).long().to(model.device)
    report = model.eval().stream_report(batch)
    others = report.correlation[~torch.eye(P, dtype=torch.bool)]
    print(f"the streams' losses correlate by {others.mean():.3f}, the least alike two by {others.min():.3f}")

    if args.output:
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
        print(f"load({args.output!r}) has {load(args.output).num_streams} streams")


if __name__ == "__main__":
    main()
