"""The three transforms on one recycled model: parameters, loss after the same tokens, and speed.

The small model that the package carries gets P streams by each transform, and trains on the standard library's source,
with its backbone frozen or not, at each of the learning rates named. Loss is measured on files that are held out and on
prose; differences from the untouched backbone are paired by document. Runs that the results file has already are not
repeated.

Speed is measured as in `overhead.py`: a training step, a prefill and the decoding of a token, each held against the
plain backbone at batch P*B with the same tensors.

    python benchmarks/transforms.py --seeds 0 --rates 1e-3 3e-3 1e-2 3e-2
    python benchmarks/transforms.py --seeds 0 1 2 --rates-of prefix=1e-2 prompt=1e-3 lora=3e-3
    python benchmarks/transforms.py --seeds 0 1 2 --rates-of prefix=1e-2 prompt=1e-3 lora=3e-3 --trains everything
    python benchmarks/transforms.py --speed
    python benchmarks/transforms.py --table
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from machine import processor, software
from overhead import STEPS, ratio, share
from standard_texts import PROSE, standard_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale import checkpoints, load, wrap
from parscale.checkpoints import (
    CODE,
    Source,
    TrainSettings,
    calibration_ids,
    compare,
    evaluate,
    faster_in_bf16,
    pack_documents,
    small_model_path,
)

P, T, RANK = 4, 48, 8
TRANSFORMS = ("prefix", "prompt", "lora")
SEQUENCE_LENGTH, WINDOW, BATCH_SIZE = 256, 512, 4
CODE_CHARACTERS, PROSE_CHARACTERS = 2500, 600
BACKBONE_RATE = 1e-4
TURNS = 15


class Lab:
    """The backbone, its text, and how the streams of a seed start."""

    def __init__(self) -> None:
        self.backbone = AutoModelForCausalLM.from_pretrained(small_model_path(), dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(small_model_path())
        texts = standard_texts()
        self.training = list(texts.train)
        self.blocks = pack_documents(self.training, self.tokenizer, SEQUENCE_LENGTH).ids
        cut = {CODE: CODE_CHARACTERS, PROSE: PROSE_CHARACTERS}
        self.measured = {
            kind: [(name, text[: cut[kind]]) for name, text in texts.measured[kind]] for kind in (CODE, PROSE)
        }

    def wrapped(self, transform: str, seed: int) -> Any:
        """A copy of the backbone with P streams; those that start from texts have the same."""
        model = copy.deepcopy(self.backbone)
        texts = None
        if transform != "lora":
            shift = seed * 7
            texts = calibration_ids(self.training[shift:] + self.training[:shift], self.tokenizer, P, T)
        return wrap(model, P, prefix_length=T, transform=transform, rank=RANK, seed=seed, calibration=texts)

    def losses(self, model: Any) -> dict[str, Any]:
        return {
            kind: evaluate(model, self.tokenizer, documents, sequence_length=WINDOW)
            for kind, documents in self.measured.items()
        }


def train(lab: Lab, untouched: dict[str, Any], key: dict[str, Any]) -> dict[str, Any]:
    """One run: its losses, and their differences from the untouched backbone's."""
    model = lab.wrapped(key["transform"], key["seed"])
    before = lab.losses(model)
    settings = TrainSettings(
        data=[Source.of("the standard library", lab.training)],
        tokens=key["tokens"],
        sequence_length=SEQUENCE_LENGTH,
        batch_size=BATCH_SIZE,
        streams_learning_rate=key["rate"],
        aggregator_learning_rate=key["rate"],  # as in the rows on file
        learning_rate=BACKBONE_RATE,
        freeze_backbone=key["trains"] == "streams",
        bf16=faster_in_bf16(torch.device("cpu")),
        save_every=key["tokens"],  # at the end only
        seed=key["seed"],
    )
    with tempfile.TemporaryDirectory() as folder:
        converted, trained = Path(folder, "converted"), Path(folder, "trained")
        model.save_pretrained(converted)
        lab.tokenizer.save_pretrained(converted)
        run = checkpoints.train(str(converted), trained, settings)
        after = lab.losses(load(trained))
    return key | {
        "before": {kind: asdict(compare(before[kind], untouched[kind])) for kind in before},
        "after": {kind: asdict(compare(after[kind], untouched[kind])) for kind in after},
        "by_document": {kind: [document.loss for document in after[kind].documents] for kind in after},
        "seconds": run["seconds"],
    }


# -- speed


def speeds(lab: Lab) -> dict[str, dict[str, float]]:
    """Each transform's times as ratios to the plain backbone's at batch P*B, everything trained, with its tensors."""
    ids = torch.from_numpy(lab.blocks[:BATCH_SIZE]).long()  # (B, S)
    ratios: dict[str, dict[str, float]] = {}
    for transform in TRANSFORMS:
        model, plain = lab.wrapped(transform, 0), copy.deepcopy(lab.backbone)
        share(model, plain)
        ratios[transform] = {}
        for name, given in (("train", ids), ("prefill", ids), ("decode", ids[:1])):
            steps = [STEPS[name](kind, each, given, P) for kind, each in (("parscale", model), ("plain", plain))]
            ratios[transform][name] = ratio(*steps, TURNS, "cpu")["ratio"]
        print(transform, ratios[transform], flush=True)
    return ratios


# -- results


def sizes(lab: Lab) -> dict[str, int]:
    """How many parameters each transform has, without the aggregator, which all share."""
    return {transform: parameters_of(lab.wrapped(transform, 0)) for transform in TRANSFORMS}


def parameters_of(model: Any) -> int:
    model.freeze_backbone()
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "aggregate_layer" not in name
    )


def best_rate(results: dict[str, Any], transform: str, trains: str) -> float:
    """The learning rate that most seeds ran with, which was the best one of the first seed."""
    wanted = {"transform": transform, "trains": trains}
    return Counter(run["rate"] for run in results["runs"] if wanted.items() <= run.items()).most_common(1)[0][0]


def table(results: dict[str, Any]) -> str:
    """Of each transform at its best rate: means over seeds, and the lowest and the highest of them."""
    lines = [
        "| transform | trains | parameters | rate | code before | code after | prose after | step | prefill | decode |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for trains in ("streams", "everything"):
        for transform in TRANSFORMS:
            rate = best_rate(results, transform, trains)
            wanted = {"transform": transform, "trains": trains, "rate": rate}
            runs = [run for run in results["runs"] if wanted.items() <= run.items()]
            cells = []
            for when, kind in (("before", CODE), ("after", CODE), ("after", PROSE)):
                found = [run[when][kind]["difference"] for run in runs]
                cells.append(f"{fmean(found):+.4f} ({min(found):+.4f}, {max(found):+.4f})")
            speed = results["speed"][transform]
            times = [f"{speed[name]:.2f}" for name in ("train", "prefill", "decode")]
            cells += times if trains == "streams" else [""] * 3
            size = f"{results['parameters'][transform]:,}"
            lines.append(f"| `{transform}` | {trains} | {size} | {rate:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "transforms.json")
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="for every transform")
    parser.add_argument("--rates-of", nargs="*", default=[], metavar="TRANSFORM=RATE")
    parser.add_argument("--trains", choices=["streams", "everything"], default="streams")
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--speed", action="store_true", help="measure speed, on a machine that does nothing else")
    parser.add_argument("--table", action="store_true", help="print the results file as markdown, and measure nothing")
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.exists() else {"runs": []}
    if args.table:
        print(table(results))
        return
    lab = Lab()
    results |= {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": software(),
        "streams": {"P": P, "T": T, "rank": RANK},
        "parameters": sizes(lab),
    }
    if args.speed:
        results["speed"] = speeds(lab)
    untouched = lab.losses(lab.backbone)
    results["untouched"] = {kind: result.loss for kind, result in untouched.items()}
    pairs = [(transform, rate) for transform in TRANSFORMS for rate in args.rates]
    pairs += [(name, float(rate)) for name, rate in (pair.split("=") for pair in args.rates_of)]
    for seed in args.seeds:
        for transform, rate in pairs:
            key = {"transform": transform, "rate": rate, "seed": seed, "trains": args.trains, "tokens": args.tokens}
            if any(key.items() <= run.items() for run in results["runs"]):
                continue
            run = train(lab, untouched, key)
            results["runs"].append(run)
            args.output.write_text(json.dumps(results, indent=1) + "\n")
            shown = ", ".join(
                f"{kind} {run['before'][kind]['difference']:+.4f} -> {run['after'][kind]['difference']:+.4f}"
                for kind in (CODE, PROSE)
            )
            print(f"{transform} {rate:g} seed {seed} {args.trains}: {shown} in {run['seconds']:.0f} s", flush=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
