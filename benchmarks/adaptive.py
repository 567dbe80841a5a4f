"""Streams on uncertain tokens only: the loss by the mean number of streams, with thresholds from another text.

The package's small model gets P streams that share keys and values, and all of it trains on the standard library's
source. `diagnose` proposes thresholds from the beginnings of every other held-out file. Each is measured on those of
the remaining files by `evaluate(..., adaptive=)`; differences from stream 0 alone are paired by document.

    python benchmarks/adaptive.py --output benchmarks/results/adaptive.json
    python benchmarks/adaptive.py --table benchmarks/results/adaptive.json
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from machine import processor, software
from rich.console import Console
from standard_texts import standard_texts

from parscale import ParScaleConfig
from parscale.checkpoints import (
    CODE,
    Document,
    Source,
    TrainSettings,
    compare,
    convert,
    diagnose,
    evaluate,
    faster_in_bf16,
    format_interval,
    open_checkpoint,
    require_tokenizer,
    small_model_path,
    train,
)

SEQUENCE_LENGTH, BATCH = 512, 4


def trained(args: argparse.Namespace, documents: Sequence[Document], folder: Path) -> tuple[Any, Any]:
    """The model after training, and its tokenizer."""
    calibration = folder / "calibration.txt"
    calibration.write_text("\n".join(text for _, text in documents[:: max(1, len(documents) // 50)]), encoding="utf-8")
    streams = ParScaleConfig(args.streams, kv="shared", seed=args.seed)
    convert(str(small_model_path()), str(folder / "converted"), streams, calibration_files=[calibration])
    settings = TrainSettings(
        data=[Source.of("training documents", documents)],
        tokens=args.tokens,
        sequence_length=SEQUENCE_LENGTH,
        batch_size=BATCH,
        learning_rate=args.backbone_rate,
        streams_learning_rate=args.streams_rate,
        aggregator_learning_rate=args.streams_rate,  # as in the rows on file
        bf16=faster_in_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        seed=args.seed,
    )
    train(str(folder / "converted"), folder / "trained", settings, console=Console(stderr=True))
    model, tokenizer = open_checkpoint(str(folder / "trained"))
    return model.float(), require_tokenizer(tokenizer, str(folder))


def measure(model: Any, tokenizer: Any, proposing: Sequence[Document], documents: Sequence[Document]) -> Any:
    """One row for each threshold: the share of the tokens it was proposed for, and what it gives on other documents."""
    diagnosis = diagnose(model, tokenizer, proposing, sequence_length=SEQUENCE_LENGTH).to_dict()
    proposed = [(row["tokens"], row["entropy_above"]) for row in diagnosis["gain_by_share"] if row["tokens"] < 1]
    rows, alone = [], None
    for share, threshold in [(0.0, math.inf), *proposed, (1.0, 0.0)]:
        found = evaluate(model, tokenizer, documents, sequence_length=SEQUENCE_LENGTH, adaptive=threshold)
        alone = alone or found
        rows.append(
            {
                "share": share,
                "threshold": None if math.isinf(threshold) else threshold,
                "mean_streams": found.mean_streams,
                "loss": found.loss,
                "against_stream_0": asdict(compare(found, alone)),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def table(result: dict[str, Any]) -> str:
    """Markdown: for each threshold the mean number of streams and the loss."""
    titles = ["proposed for", "threshold, nats", "streams for a token, mean", "loss, nats per token"]
    titles.append("difference from stream 0 (95 % interval)")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in result["rows"]:
        cells = [f"{row['share']:.0%}", "infinite" if row["threshold"] is None else f"{row['threshold']:.2f}"]
        cells += [f"{row['mean_streams']:.2f}", f"{row['loss']:.4f}"]
        cells.append(format_interval(row["against_stream_0"]))
        lines.append(f"| {' | '.join(cells if row['share'] else [*cells[:-1], ''])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=4, help="P")
    parser.add_argument("--tokens", type=int, default=50_000, help="to train on")
    parser.add_argument("--characters", type=int, default=2000, help="of each file that is measured")
    parser.add_argument("--backbone-rate", type=float, default=1e-4)
    parser.add_argument("--streams-rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a results file, and no more")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))))
        return
    texts = standard_texts(args.characters)
    held_out = texts.measured[CODE]
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = trained(args, texts.train, Path(folder))
    settings = ("streams", "tokens", "characters", "backbone_rate", "streams_rate", "seed")
    result = {
        "processor": processor(),
        "versions": software(),
        **{name: getattr(args, name) for name in settings},
        "documents": len(held_out[1::2]),
        "rows": measure(model, tokenizer, held_out[::2], held_out[1::2]),
    }
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
