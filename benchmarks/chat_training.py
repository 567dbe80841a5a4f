"""What rises, and what falls, when streams are trained by TRL: the examples of SFT, DPO and GRPO as they are.

Each example runs in a process of its own on the package's small model, and prints a figure of its beginning and one of
its end.

    python benchmarks/chat_training.py --output benchmarks/results/chat_training.json
    python benchmarks/chat_training.py --table benchmarks/results/chat_training.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import processor

EXAMPLES = Path(__file__).parent.parent / "examples"
# By example: what its figure is, and where in what it prints.
FIGURES = {
    "sft_chat_model": ("loss on the assistant's tokens, in nats", r"loss on the answers (\S+), at the end (\S+)"),
    "dpo_chat_model": ("pairs told apart", r"preferred answers told apart: (\S+), at the end (\S+)"),
    "grpo_model": ("reward", r"reward (\S+), at the end (\S+)"),
}


def measure(name: str) -> dict[str, Any]:
    """Runs an example, in an empty folder, on the CPU."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, EXAMPLES / f"{name}.py"],
            cwd=folder,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
            check=True,
            capture_output=True,
            text=True,
        )
    first, last = re.findall(FIGURES[name][1], done.stdout)[0]
    return {"example": name, "first": first, "last": last, "seconds": round(time.perf_counter() - start)}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the figure at both ends."""
    lines = ["| example | figure | at first | at the end |", "|---|---|---|---|"]
    for row in rows:
        lines.append(f"| `{row['example']}.py` | {FIGURES[row['example']][0]} | {row['first']} | {row['last']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a results file, and no more")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))["rows"]))
        return
    rows = []
    for name in FIGURES:
        rows.append(measure(name))
        print(rows[-1], flush=True)
    if args.output is not None:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl")}
        args.output.write_text(json.dumps({"processor": processor(), **versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
