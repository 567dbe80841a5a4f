"""How long packing takes against the text's length: as one document, which a text file is, and in many.

Each length is packed into sequences of S tokens in both ways, in turns within one process; the fastest of three counts.
Where the time grows with the length alone, seconds for each million tokens stay the same down the table.

    python benchmarks/packing.py
    python benchmarks/packing.py --lengths 100000 2000000 --sequence-length 1024 --output packing.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from machine import processor
from rich.console import Console
from rich.table import Table

from parscale.checkpoints import pack

DOCUMENT = 500  # tokens of each of many documents
TURNS = 3


def seconds(documents: list[list[int]], sequence_length: int) -> float:
    start = time.perf_counter()
    for _ in pack(documents, sequence_length):
        pass
    return time.perf_counter() - start


def measure(length: int, sequence_length: int) -> dict[str, Any]:
    ids = list(range(length))
    ways = {"one": [ids], "many": [ids[start : start + DOCUMENT] for start in range(0, length, DOCUMENT)]}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, documents in ways.items():
            times[name].append(seconds(documents, sequence_length))
    return {"tokens": length} | {name: min(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[125_000, 250_000, 500_000, 1_000_000, 2_000_000])
    parser.add_argument("--sequence-length", type=int, default=128, help="S, tokens in a sequence")
    parser.add_argument("--output", type=Path, help="also write the figures into this file, as JSON")
    args = parser.parse_args()
    rows = [measure(length, args.sequence_length) for length in args.lengths]
    table = Table("tokens", "one document", "in many", "seconds for each million", box=None, padding=(0, 2))
    for row in rows:
        share = 1e6 * row["one"] / row["tokens"]
        table.add_row(f"{row['tokens']:,}", f"{row['one']:.3f} s", f"{row['many']:.3f} s", f"{share:.3f}")
    Console(highlight=False).print(table)
    if args.output is not None:
        figures = {"sequence_length": args.sequence_length, "processor": processor(), "rows": rows}
        args.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
