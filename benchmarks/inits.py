"""Which start of the streams is best: frozen small backbones, by start, learning rate and seed.

Each run makes a start, trains prefixes and aggregator on the standard library's source with Adam (in a loop of its own
and not by `train`, since some arms change the loss or the parameters), and measures the paired
difference in loss from the untouched backbone on files that are held out and on prose: before, on the files' beginnings
along the way, and after. A seed sets the texts, the draws and the order of the blocks, so that the arms of one seed
differ in nothing else. Runs that the results file has already are not repeated.

    python benchmarks/second_backbone.py --output neox
    python benchmarks/inits.py --seeds 0 1 2 --arms random sampled "sampled, ended" text "text, cut and ended"
    python benchmarks/inits.py --seeds 0 1 2 --arms random text "text, cut and ended" --model neox
    python benchmarks/inits.py --seeds 0 --arms "text, damped" "text, mlp" --screen
    python benchmarks/inits.py --table

`sampled` and `text` are `init="context"` without and with calibration; `sampled, ended` and `text, cut and ended` are
`init="documents"`, likewise.

P streams, T prefix tokens, G key heads, D head size, B rows, S tokens, H hidden size.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from machine import processor, software
from standard_texts import PROSE, standard_texts
from starts import STARTS, Lab, P, T, prefixes, streams_of
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale import wrap
from parscale.checkpoints import (
    CODE,
    Document,
    crossed_interval,
    evaluate,
    faster_in_bf16,
    format_interval,
    pack_documents,
    small_model_path,
    standard_library_split,
)

SEQUENCE_LENGTH, WINDOW, BATCH_SIZE = 256, 512, 4
CODE_CHARACTERS, PROSE_CHARACTERS = 2500, 600  # of each document, measured before and after, in float32
MIDDLE = "held-out code, from within"  # the same files' next characters, so many, which follow on what is not shown
MIDDLE_CHARACTERS = 700
BEGINNING = 1000  # of each held-out file, measured along the way, in the dtype of the training
EVERY = 8  # steps between two such measurements


# -- training


class Direct:
    """Prefixes are trained as they are."""

    def __init__(self, model: Any, rate: float) -> None:
        self.groups = [{"params": list(prefixes(model).values()), "lr": rate}]

    def write(self) -> None: ...

    def backward(self) -> None: ...


class Reparametrised:
    """Prefixes are functions of other parameters, which are trained in their place; nothing of it is left afterwards.

    `"scale"`: start + scale * change, with a scale for each layer and head that starts as its start's deviation.
    `"mlp"`: start + the output of a two-layer perceptron on a vector for each stream and token, trained at a tenth of
    the learning rate.
    """

    def __init__(self, model: Any, rate: float, kind: str, seed: int) -> None:
        self.prefixes = list(prefixes(model).values())
        self.starts = [prefix.detach().clone() for prefix in self.prefixes]
        generator = torch.Generator().manual_seed(seed)
        self.changes: list[torch.Tensor] = []
        self.scales: list[torch.Tensor] = []
        if kind == "scale":
            self.changes = [torch.zeros_like(start, requires_grad=True) for start in self.starts]
            self.scales = [start.std((0, 2, 3), keepdim=True).requires_grad_() for start in self.starts]
            self.groups = [{"params": [*self.changes, *self.scales], "lr": rate}]
        else:
            width = 64
            sizes = [start.shape[1] * start.shape[3] for start in self.starts]
            self.vectors = torch.randn(P, T, width, generator=generator).requires_grad_()
            self.first = (torch.randn(width, width, generator=generator) / width**0.5).requires_grad_()
            self.last = torch.zeros(width, sum(sizes), requires_grad=True)
            self.sizes = sizes
            self.groups = [{"params": [self.vectors, self.first, self.last], "lr": 0.1 * rate}]

    def _expressions(self) -> list[torch.Tensor]:
        if self.changes:
            triples = zip(self.starts, self.scales, self.changes, strict=True)
            return [start + scale * change for start, scale, change in triples]
        output = torch.tanh(self.vectors @ self.first) @ self.last  # (P, T, all G*D)
        return [
            start + part.unflatten(2, (start.shape[1], start.shape[3])).transpose(1, 2)
            for start, part in zip(self.starts, output.split(self.sizes, dim=2), strict=True)
        ]

    def write(self) -> None:
        """Put the prefixes' present values in place."""
        self.written = self._expressions()
        for prefix, value in zip(self.prefixes, self.written, strict=True):
            prefix.data = value.detach().clone()

    def backward(self) -> None:
        """From the prefixes' gradients to those of what is trained."""
        torch.autograd.backward(self.written, [prefix.grad for prefix in self.prefixes])
        for prefix in self.prefixes:
            prefix.grad = None


def likeness(hidden: torch.Tensor) -> torch.Tensor:
    """The mean over pairs of streams of the cosine of their final hidden states `(P*B, S, H)`."""
    streams = hidden.unflatten(0, (P, -1)).float()  # (P, B, S, H)
    first, second = torch.triu_indices(P, P, offset=1)
    return cosine_similarity(streams[first], streams[second], dim=-1).mean()


# Arms that are a start and another way to train it: (start, reparametrisation, factor of the likeness in the loss).
WAYS: dict[str, tuple[str, str | None, float]] = {name: (name, None, 0.0) for name in STARTS} | {
    "text, scale": ("text", "scale", 0.0),
    "text, mlp": ("text", "mlp", 0.0),
    "text, ended, scale": ("text, ended", "scale", 0.0),
    "text, cut and ended, scale": ("text, cut and ended", "scale", 0.0),
    "text, states apart": ("text", None, 0.1),
}

SAME_TEXTS = {"sampled, ended": "sampled", "written, ended": "written"}  # what to hold an arm against, if not `text`


def train(
    model: Any, lab: Lab, arm: str, tokens: int, rate: float, seed: int, bf16: bool, on_step: Callable[[int], None]
) -> float:
    """Train the streams in place, at a rate that rises and falls to zero; returns the seconds without `on_step`."""
    _, reparametrised, factor = WAYS[arm]
    model.freeze_backbone()
    form = Reparametrised(model, rate, reparametrised, seed) if reparametrised else Direct(model, rate)
    aggregator = list(model.get_decoder().aggregate_layer.parameters())
    groups = [*form.groups, {"params": aggregator, "lr": rate}]
    trained = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    per_step = BATCH_SIZE * SEQUENCE_LENGTH
    steps = tokens // per_step
    rise = max(1, round(0.05 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (1 - step / steps) / (1 - rise / steps))
    )
    order = torch.randperm(len(lab.blocks), generator=torch.Generator().manual_seed(1000 + seed))
    seconds = 0.0
    for step in range(steps):
        start = time.perf_counter()
        model.train()
        rows = lab.blocks[order[torch.arange(step * BATCH_SIZE, (step + 1) * BATCH_SIZE) % len(order)]]
        form.write()
        with streams_of(model) as captured, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
            if factor:
                loss = loss + factor * likeness(captured[0])
        loss.backward()
        form.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        form.write()
        seconds += time.perf_counter() - start
        on_step(step + 1)
    model.eval()
    return seconds


# -- results


def stays_below(curve: list[list[float]]) -> float | None:
    """The tokens from which on the backbone is beaten at every measurement; None if it is not at the last one."""
    first = None
    for tokens, difference in reversed(curve):
        if difference >= 0:
            break
        first = tokens
    return first


def interval(differences: np.ndarray) -> str:
    """Mean and 95 % interval over seeds and documents, of differences `(seeds, documents)` in nats per token."""
    return format_interval(asdict(crossed_interval(differences)))


def table(results: dict[str, Any]) -> str:
    """The runs as markdown, by backbone, tokens and learning rate."""
    lines = []
    for model, tokens, rate in sorted({(run["model"], run["tokens"], run["learning_rate"]) for run in results["runs"]}):
        runs = [r for r in results["runs"] if (r["model"], r["tokens"], r["learning_rate"]) == (model, tokens, rate)]
        lines += [
            f"\n{model}, {tokens:,} tokens, learning rate {rate:g}: change against the untouched backbone\n",
            "| start | seeds | code before | tokens to beat | code after | its seeds | from within | prose "
            "| code against `context` | prose against `context` | correlation |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for arm in WAYS:
            of_arm = sorted((run for run in runs if run["arm"] == arm), key=lambda run: run["seed"])
            if of_arm:
                base = {run["seed"]: run for run in runs if run["arm"] == SAME_TEXTS.get(arm, "text")}
                lines.append(_row(arm, of_arm, base, results["untouched"][model]))
    for model, behind in results["behind end of text"].items():
        changes = ", ".join(
            f"{kind} {fmean(behind[kind]) - fmean(results['untouched'][model][kind]):+.4f}" for kind in behind
        )
        lines.append(f"\n{model} that has read nothing but an end-of-text token: {changes}")
    return "\n".join(lines)


def _row(arm: str, runs: list[dict[str, Any]], base: dict[int, Any], untouched: dict[str, Any]) -> str:
    """One arm: its seeds' mean, and how it differs from `context` on the seeds that both have."""

    def losses(of: list[dict[str, Any]], when: str, kind: str) -> np.ndarray:
        return np.array([run[when][kind] for run in of])  # (seeds, documents)

    def change(kind: str) -> str:
        of = [run for run in runs if kind in run["after"]]
        return interval(losses(of, "after", kind) - np.array(untouched[kind])) if of else ""

    def against(kind: str) -> str:
        of = [run for run in runs if kind in run["after"] and base.get(run["seed"], run) is not run]
        same = [base[run["seed"]] for run in of]
        return interval(losses(of, "after", kind) - losses(same, "after", kind)) if of else ""

    beaten = [stays_below(run["curve"]) for run in runs if run["curve"]]
    cells = [
        arm,
        str(len(runs)),
        f"{(losses(runs, 'before', CODE) - np.array(untouched[CODE])).mean():+.4f}",
        " ".join("never" if tokens is None else f"{tokens / 1000:.0f}k" for tokens in beaten),
        change(CODE),
        " ".join(f"{value:+.4f}" for value in (losses(runs, "after", CODE) - np.array(untouched[CODE])).mean(1)),
        change(MIDDLE),
        change(PROSE),
        against(CODE),
        against(PROSE),
        f"{fmean(run['correlation_before'] for run in runs):.3f} to {fmean(run['correlation'] for run in runs):.3f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "inits.json")
    parser.add_argument("--model", default=str(small_model_path()))
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=WAYS, default=["random", "sampled", "text"])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-2])
    parser.add_argument("--screen", action="store_true", help="measure held-out code before and after, and no more")
    parser.add_argument("--table", action="store_true", help="print the results file as markdown, and measure nothing")
    args = parser.parse_args()
    results: dict[str, Any] = {"untouched": {}, "behind end of text": {}, "runs": []}
    if args.output.exists():
        results |= json.loads(args.output.read_text())
    if args.table:
        print(table(results))
        return

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    backbone = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    name = backbone.config.model_type
    texts = standard_texts(CODE_CHARACTERS, PROSE_CHARACTERS)
    within = [(name, text[CODE_CHARACTERS:][:MIDDLE_CHARACTERS]) for name, text in standard_library_split()[1]]
    measured = {**texts.measured, MIDDLE: [(name, text) for name, text in within if len(text) == MIDDLE_CHARACTERS]}
    beginnings = [(name, text[:BEGINNING]) for name, text in texts.measured[CODE]]
    lab = Lab(backbone, tokenizer, torch.from_numpy(pack_documents(texts.train, tokenizer, SEQUENCE_LENGTH).ids).long())
    if args.screen:
        measured = {CODE: measured[CODE]}
    held_out = torch.from_numpy(pack_documents(standard_library_split()[1], tokenizer, SEQUENCE_LENGTH).ids[:8]).long()
    bf16 = faster_in_bf16(backbone.device)

    def measure(model: Any) -> dict[str, list[float]]:
        return {kind: losses_by_document(model, tokenizer, documents) for kind, documents in measured.items()}

    def on_beginnings(model: Any) -> list[float]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return losses_by_document(model, tokenizer, beginnings)

    def correlation(model: Any) -> float:
        with torch.no_grad():
            report = model.eval().stream_report(held_out)
        return round(float(report.correlation[~torch.eye(P, dtype=torch.bool)].mean()), 4)

    at_the_beginning = np.array(on_beginnings(backbone))
    results["untouched"].setdefault(name, {}).update(measure(backbone))
    end = torch.full((2, 1), tokenizer.eos_token_id)  # two equal streams are the backbone that has read this token
    behind = wrap(copy.deepcopy(backbone), 2, prefix_length=1, calibration=end, init="context")
    results["behind end of text"].setdefault(name, {}).update(measure(behind))
    results |= {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": software(),
    }
    keys = [
        {"model": name, "arm": arm, "learning_rate": rate, "seed": seed, "tokens": args.tokens}
        for seed in args.seeds
        for rate in args.learning_rates
        for arm in args.arms
    ]
    for key in keys:
        if any(key.items() <= run.items() for run in results["runs"]):
            continue
        start = time.perf_counter()
        model = STARTS[WAYS[key["arm"]][0]](lab, key["seed"]).eval()
        run: dict[str, Any] = key | {"before": measure(model), "correlation_before": correlation(model), "curve": []}

        def on_step(step: int, model: Any = model, curve: list[Any] = run["curve"]) -> None:
            if step % EVERY == 0 and not args.screen:
                difference = float((np.array(on_beginnings(model)) - at_the_beginning).mean())
                curve.append([step * BATCH_SIZE * SEQUENCE_LENGTH, round(difference, 5)])

        on_step(0)
        seconds = train(model, lab, *(key[k] for k in ("arm", "tokens", "learning_rate", "seed")), bf16, on_step)
        run |= {"after": measure(model), "correlation": correlation(model), "seconds": round(seconds, 1), "bf16": bf16}
        results["runs"].append(run)
        save(results, args.output)
        changes = [fmean(run[when][CODE]) - fmean(results["untouched"][name][CODE]) for when in ("before", "after")]
        print(
            f"{name} {key['arm']:>18}, learning rate {key['learning_rate']:g}, seed {key['seed']}: code "
            f"{changes[0]:+.4f} to {changes[1]:+.4f}, correlation {run['correlation']:.3f}, {seconds:.0f} of "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )


def losses_by_document(model: Any, tokenizer: Any, documents: Sequence[Document]) -> list[float]:
    """Losses in nats per token, in the documents' order."""
    evaluation = evaluate(model, tokenizer, documents, sequence_length=WINDOW, batch_size=2)
    return [round(document.loss, 5) for document in evaluation.documents]


def save(results: dict[str, Any], path: Path) -> None:
    """As JSON with one line for each run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in results.items() if name != "runs"]
    runs = ",\n".join(json.dumps(run) for run in results["runs"])
    path.write_text("{\n" + ",\n".join(lines) + f',\n"runs": [\n{runs}\n]\n}}\n')


if __name__ == "__main__":
    main()
