"""Train streams for P = 2, 4 and 8 on one frozen backbone, save each set alone, and choose P at inference.

The paper's dynamic P: one backbone, several sets, each a small part of a large model's size. They are measured against
each other, not against controls. The text is the source of numpy, scipy and matplotlib, which the small model has not
seen.

    python examples/streams_for_each_p.py --steps 200 --output sets
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale import ParScaleConfig, load, wrap
from parscale.checkpoints import (
    Source,
    TrainSettings,
    convert,
    evaluate,
    package_source_split,
    small_model_path,
    train,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(small_model_path()))
    parser.add_argument("--num-streams", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--output", help="folder for the sets; a temporary one if left out")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    training, held_out = package_source_split(["numpy", "scipy", "matplotlib"])
    documents = [(name, text[:1500]) for name, text in held_out[:4]]
    settings = TrainSettings(
        data=[Source.of("numpy, scipy and matplotlib", training[::15])],
        tokens=args.steps * 4 * args.sequence_length,
        sequence_length=args.sequence_length,
        batch_size=4,
        freeze_backbone=True,
    )

    with tempfile.TemporaryDirectory() as temporary:
        output = Path(args.output or temporary)
        trained = {}
        for P in args.num_streams:
            start = Path(temporary, f"start-p{P}")
            convert(args.model, start, ParScaleConfig(P, seed=0), streams_only=True)
            train(str(start), output / f"p{P}", settings)
            alone = load(output / f"p{P}")
            trained[P] = evaluate(alone, tokenizer, documents, sequence_length=args.sequence_length).loss

        model = wrap(AutoModelForCausalLM.from_pretrained(args.model), num_streams=1)
        for P in args.num_streams:
            model.load_streams(output / f"p{P}", name=f"p{P}")

    loss = evaluate(model, tokenizer, documents, sequence_length=args.sequence_length).loss
    print(f"P = 1, the backbone: {loss:.4f} nats per token")
    same = True
    for P in args.num_streams:
        model.set_streams(f"p{P}")
        loss = evaluate(model, tokenizer, documents, sequence_length=args.sequence_length).loss
        print(f"P = {P}: {loss:.4f} nats per token")
        same &= abs(loss - trained[P]) < 1e-5
    print("Beginnings of four files, no controls: a lower loss here is no gain of streams yet (docs/training.md).")
    print(f"each set loaded as it was trained: {same}")


if __name__ == "__main__":
    main()
