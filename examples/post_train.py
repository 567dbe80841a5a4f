"""Recycle a checkpoint from Python: convert it, post-train its streams on text, and look at what that has changed.

The same from the command line is `parscale convert` and `parscale train`; under `torchrun` or `accelerate launch` it
runs on many devices.

    python examples/post_train.py --tokens 100000
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from parscale import ParScaleConfig, load
from parscale.checkpoints import Source, TrainSettings, convert, package_source_split, small_model_path, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(small_model_path()))
    parser.add_argument("--num-streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--eval-tokens", type=int, default=20_000)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        # Text that the small model has not seen.
        training, held_out = package_source_split(["numpy", "scipy", "matplotlib"])

        convert(args.model, work / "converted", ParScaleConfig(args.num_streams, seed=0))
        settings = TrainSettings(
            data=[Source.of("source of packages", training[::5])],  # or files, folders, datasets by their names
            eval_data={"held-out": Source.of("held-out files", held_out)},
            eval_tokens=args.eval_tokens,
            tokens=args.tokens,
            sequence_length=args.sequence_length,
            batch_size=4,
            freeze_backbone=True,
        )
        report = train(str(work / "converted"), work / "trained", settings)

        for moment, loss in report["losses"]["held-out"].items():
            print(f"{moment:>9}: {loss:.4f} nats per token")
        for entry in report["comparisons"]:
            place = f"{entry['where']} of {entry['documents']} files"
            print(f"{place}, against the untouched backbone: {entry['difference']:+.4f}")
        print("No gain of streams yet: the backbone trained alone and one prefix have to be beaten too (--controls).")
        print(f"P = {load(work / 'trained').num_streams}, {report['trained_parameters']:,} parameters were trained")


if __name__ == "__main__":
    main()
