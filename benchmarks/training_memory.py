"""What post-training takes of each GPU's memory, counted for three backbones, as a table.

    python benchmarks/training_memory.py --output benchmarks/results/training_memory.md

Nothing is measured here: `tests/scaling_laws/test_training_memory.py` holds the count against small models.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from parscale.scaling_laws import known_backbones, known_hardware, training_memory

GIB = 2**30
STREAMS = (2, 4, 8)
GPUS = (1, 8, 64)
TRAINS = {"streams": "streams", "everything": "streams and backbone"}


def row(config: dict, streams: int, trains: str, length: int, batch: int, hardware: str) -> list[str]:
    """GiB on each GPU, for each number of GPUs."""
    cells = []
    for gpus in GPUS:
        found = training_memory(
            config,
            num_streams=streams,
            batch_size=batch,
            sequence_length=length,
            gpus=gpus,
            sharding="fsdp" if gpus > 1 else "none",
            trains=trains,
            checkpointing=True,
            hardware=hardware,
        )
        size = found.memory_bytes / GIB
        cells.append(f"{size:.1f}" if found.fits else f"*{size:,.0f}*")
    return cells


def table(length: int, batch: int, hardware: str) -> str:
    device = known_hardware()[hardware]
    lines = [
        f"GiB on each GPU, counted: {batch} sequence{'s' if batch > 1 else ''} of {length:,} tokens on each GPU at "
        "once, bfloat16 under autocast, 32-bit masters and AdamW states of what trains, activation checkpointing, FSDP "
        f"on more than one GPU. *Slanted*: does not fit one ({device.label}, {device.memory_gb:g} GB).",
        "",
        f"| backbone | P | trains | {' | '.join(f'{gpus} GPU' + 's' * (gpus > 1) for gpus in GPUS)} |",
        "| --- " * (3 + len(GPUS)) + "|",
    ]
    for name, config in known_backbones().items():
        for streams in STREAMS:
            for trains, label in TRAINS.items():
                cells = [name, str(streams), label, *row(config, streams, trains, length, batch, hardware)]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1, help="sequences on each GPU at once")
    parser.add_argument("--hardware", default="a100-80gb")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    text = table(args.sequence_length, args.batch_size, args.hardware)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
