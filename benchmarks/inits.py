"""Which start of the streams is best: the small model with a frozen backbone, by init, learning rate and seed.

Each run trains prefixes and aggregator on the standard library's source and reports the paired difference in loss from
the untouched backbone, on files that are held out and on prose, before the training and after it. `sampled` and `text`
are both `init="context"`, without and with calibration. Runs that the results file has already are not repeated.

    python benchmarks/inits.py --tokens 120000 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import processor
from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale import wrap
from parscale.checkpoints.compare import compare
from parscale.checkpoints.evaluate import evaluate
from parscale.checkpoints.posttrain import Recipe, faster_in_bf16, post_train
from parscale.checkpoints.quickstart import standard_texts
from parscale.checkpoints.small_model import small_model_path
from parscale.checkpoints.text import pack

P, T, SEQUENCE_LENGTH, WINDOW = 4, 48, 256, 512
STARTS = ("random", "sampled", "text")


def calibration(start: str, blocks: torch.Tensor, seed: int) -> torch.Tensor | None:
    """P different pieces of training text, drawn by the seed, for `text` alone."""
    if start != "text":
        return None
    rows = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[:P]
    return blocks[rows, :T]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "inits.json")
    parser.add_argument("--model", default=str(small_model_path()))
    parser.add_argument("--tokens", type=int, default=120_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-2])
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    backbone = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    texts = standard_texts()
    blocks = pack(texts.train, tokenizer, SEQUENCE_LENGTH)

    def measure(model: Any) -> dict[str, Any]:
        return {
            kind: evaluate(model, tokenizer, documents, sequence_length=WINDOW)
            for kind, documents in texts.measured.items()
        }

    untouched = measure(backbone)

    def differences(model: Any) -> dict[str, Any]:
        return {kind: asdict(compare(result, untouched[kind])) for kind, result in measure(model).items()}

    results = json.loads(args.output.read_text()) if args.output.exists() else {"runs": []}
    results |= {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "untouched": {kind: result.loss for kind, result in untouched.items()},
    }
    bf16 = faster_in_bf16(backbone.device)
    for seed in args.seeds:
        for rate in args.learning_rates:
            for start in args.starts:
                key = {"start": start, "learning_rate": rate, "seed": seed, "tokens": args.tokens}
                if any(key.items() <= run.items() for run in results["runs"]):
                    continue
                init = "random" if start == "random" else "context"
                texts_of_streams = calibration(start, torch.from_numpy(blocks), seed)
                model = wrap(
                    copy.deepcopy(backbone), P, prefix_length=T, init=init, seed=seed, calibration=texts_of_streams
                )
                model.freeze_backbone()
                before = differences(model)
                recipe = Recipe(args.tokens, streams_learning_rate=rate, seed=seed)
                training = post_train(model, blocks, recipe, bf16=bf16)
                report = model.eval().stream_report(torch.from_numpy(blocks[:8]))
                correlation = report.correlation[~torch.eye(P, dtype=torch.bool)].mean().item()
                run = key | {"before": before, "after": differences(model), "correlation": correlation}
                results["runs"].append(run | {"seconds": training.seconds, "bf16": bf16})
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(results, indent=1) + "\n")
                shown = ", ".join(f"{kind} {value['difference']:+.4f}" for kind, value in run["after"].items())
                print(f"{start:>8}, learning rate {rate:g}, seed {seed}: {shown}", flush=True)


if __name__ == "__main__":
    main()
