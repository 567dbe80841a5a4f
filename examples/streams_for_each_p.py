"""Train streams for P = 2, 4 and 8 on one frozen backbone, save each set alone, and choose P at inference.

The paper's dynamic P: more streams where a better answer is worth more computation, at a few per cent of the memory
for each set. The text is the source of Python's standard library.

    python examples/streams_for_each_p.py --steps 200 --output sets
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale import load, wrap
from parscale.checkpoints.evaluation.text_loss import evaluate
from parscale.checkpoints.small_model import small_model_path
from parscale.checkpoints.texts.standard_library import pack, split
from parscale.checkpoints.training.posttrain import Recipe, post_train

PREFIX_LENGTH = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(small_model_path()))
    parser.add_argument("--num-streams", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--output", help="folder for the sets; a temporary one if left out")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    training, held_out = split()
    blocks = pack(training[::15], tokenizer, args.sequence_length)  # (n, S)
    documents = [(name, text[:1500]) for name, text in held_out[:4]]

    model = wrap(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), num_streams=1)
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(args.output or temporary)
        trained = {}
        for P in args.num_streams:
            name = f"p{P}"
            texts = torch.from_numpy(blocks[:: len(blocks) // P][:P, :PREFIX_LENGTH])  # (P, T), another for each stream
            model.add_streams(name, P, prefix_length=PREFIX_LENGTH, calibration=texts)
            model.set_streams(name)
            model.freeze_backbone()
            post_train(model, blocks, Recipe(tokens=args.steps * 4 * args.sequence_length, batch_size=4))
            model.save_streams(output / name)
            trained[P] = evaluate(model, tokenizer, documents, sequence_length=args.sequence_length).loss

        first, *others = args.num_streams
        again = load(output / f"p{first}", backbone=args.model, dtype=torch.float32).eval()
        for P in others:
            again.load_streams(output / f"p{P}")

    with again.use_streams(None):
        loss = evaluate(again, tokenizer, documents, sequence_length=args.sequence_length).loss
    print(f"P = 1, the backbone: {loss:.4f} nats per token")
    same = True
    for P in args.num_streams:
        again.set_streams(f"p{P}")
        loss = evaluate(again, tokenizer, documents, sequence_length=args.sequence_length).loss
        print(f"P = {P}: {loss:.4f} nats per token")
        same &= abs(loss - trained[P]) < 1e-5
    print(f"each set loaded as it was trained: {same}")


if __name__ == "__main__":
    main()
