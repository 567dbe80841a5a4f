"""A checkpoint recycled: post-trained with P streams, and with none for the same tokens, on the same text.

The backbone is the small model that the package carries. It trains on the standard library's source and, if given, on
prose; it is measured on files and articles that are held out, and on text of another kind, pydoc's topics. Differences
in loss are paired by document. A run that is finished in the folder of `--work` is not trained again; an interrupted
one goes on.

    python benchmarks/recycle.py --prose wikitext2-valid.txt --held-out-prose wikitext2-test.txt --tokens 400000
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from machine import processor, software
from rich.console import Console
from standard_texts import PROSE, standard_texts

from parscale import ParScaleConfig
from parscale.checkpoints import (
    CODE,
    Document,
    Evaluation,
    Source,
    TrainSettings,
    compare,
    convert,
    evaluate,
    faster_in_bf16,
    open_checkpoint,
    require_tokenizer,
    small_model_path,
    train,
)

SEQUENCE_LENGTH, WINDOW, BATCH = 512, 512, 4
ARTICLES = "held-out articles"
ALONE, ALL, FROZEN = "backbone alone", "streams and backbone", "streams, backbone frozen"


def articles(path: Path) -> list[Document]:
    """The articles of a file in WikiText's format, in which ` = Title = ` stands above each."""
    parts = re.split(r"^ = ([^=].*[^=]) = $", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [
        (f"{number}: {title}", text) for number, (title, text) in enumerate(zip(parts[1::2], parts[2::2], strict=True))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "recycle.json")
    parser.add_argument("--work", type=Path, help="where runs lie; by default a folder that is removed at the end")
    parser.add_argument("--prose", type=Path, help="a file of articles to train on")
    parser.add_argument("--held-out-prose", type=Path, help="a file of articles to measure on")
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--frozen", type=int, nargs="*", default=[4])
    parser.add_argument("--backbone-rate", type=float, default=1e-4)
    parser.add_argument("--streams-rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(args, args.work or Path(folder))


def read_texts(args: argparse.Namespace) -> tuple[list[Document], dict[str, Sequence[Document]]]:
    """Documents to train on, and by kind those to measure on."""
    texts = standard_texts(3500, 1000)
    training = list(texts.train) + (articles(args.prose) if args.prose else [])
    measured: dict[str, Sequence[Document]] = {CODE: texts.measured[CODE]}
    if args.held_out_prose:
        measured[ARTICLES] = [(name, text[:3500]) for name, text in articles(args.held_out_prose)]
    return training, measured | {PROSE: texts.measured[PROSE]}


def converted(source: str, folder: Path, P: int, seed: int, calibration: Path) -> str:
    """The folder of the model with P streams, which is made unless it is there."""
    if not folder.exists():
        convert(source, str(folder), ParScaleConfig(P, seed=seed), calibration_files=[calibration])
    return str(folder)


def settings(args: argparse.Namespace, kind: str, training: list[Document]) -> TrainSettings:
    """How a run of this kind trains."""
    return TrainSettings(
        data=[Source.of("training documents", training)],
        tokens=args.tokens,
        sequence_length=SEQUENCE_LENGTH,
        batch_size=BATCH,
        learning_rate=None if kind == FROZEN else args.backbone_rate,
        streams_learning_rate=args.streams_rate,
        aggregator_learning_rate=args.streams_rate,  # as in the rows on file
        freeze_backbone=kind == FROZEN,
        bf16=faster_in_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        seed=args.seed,
    )


def measure(args: argparse.Namespace, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    training, measured = read_texts(args)
    calibration = work / "calibration.txt"
    calibration.write_text("\n".join(text for _, text in training[:: max(1, len(training) // 50)]), encoding="utf-8")

    results = json.loads(args.output.read_text()) if args.output.exists() else {"runs": []}
    results |= {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": software(),
        "documents": {"training": len(training), **{name: len(documents) for name, documents in measured.items()}},
    }

    def losses(checkpoint: str) -> dict[str, Evaluation]:
        model, tokenizer = open_checkpoint(checkpoint)
        tokenizer = require_tokenizer(tokenizer, checkpoint)
        return {
            name: evaluate(model.float(), tokenizer, documents, sequence_length=WINDOW)
            for name, documents in measured.items()
        }

    source = str(small_model_path())
    untouched = losses(source)
    results["untouched"] = {name: result.loss for name, result in untouched.items()}
    evaluations: dict[str, dict[str, Evaluation]] = {}
    rows = [(ALONE if P == 1 else ALL, P) for P in args.streams] + [(FROZEN, P) for P in args.frozen]
    for kind, P in rows:
        key: dict[str, Any] = {
            "kind": kind,
            "num_streams": P,
            "tokens": args.tokens,
            "backbone_rate": args.backbone_rate,
            "streams_rate": args.streams_rate,
            "seed": args.seed,
        }
        name = f"{kind.replace(' ', '-').replace(',', '')}-{P}"
        run = work / name
        checkpoint = source if P == 1 else converted(source, work / f"converted-{P}", P, args.seed, calibration)
        report = train(checkpoint, run, settings(args, kind, training), resume=True, console=Console(stderr=True))
        evaluations[name] = losses(str(run))
        differences = {
            f"against {what}": {text: asdict(compare(evaluations[name][text], baseline[text])) for text in measured}
            for what, baseline in {"untouched": untouched, ALONE: evaluations.get("backbone-alone-1")}.items()
            if baseline is not None
        }
        results["runs"] = [other for other in results["runs"] if not key.items() <= other.items()]
        results["runs"].append(
            key
            | differences
            | {"loss": {text: result.loss for text, result in evaluations[name].items()}}
            | {"seconds": report["seconds"], "tokens_per_second": report["tokens_per_second"]}
        )
        args.output.write_text(json.dumps(results, indent=1) + "\n")
        shown = ", ".join(
            f"{text} {value['difference']:+.4f}" for text, value in differences["against untouched"].items()
        )
        print(f"{kind}, P = {P}: {shown}", flush=True)


if __name__ == "__main__":
    main()
