"""What the finished rows say: comparisons with intervals, accuracies, the law's k, into `evidence.json` and `.md`.

    .venv/bin/python -P benchmarks/evidence/report.py

Every figure comes from rows; nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from arms import Run
from fitted_law import law, law_sentence
from plan import LATER_VARIANTS, PREFIX_LENGTHS, SHARED_VARIANTS, SIZES, Rows, read_rows, tuning_loss
from recycling import RecycleRun
from synthetic import TaskRun

from parscale.checkpoints import HELD_AGAINST, Interval, crossed_interval, format_interval

RESULTS = Path(__file__).parents[1] / "results"
WINDOW = "shared-window=8"
SCRATCH_PAIRS = {
    "P = 4": ("dense", "prefix", "long prefix", "twin", "twice as wide", "average of 4"),
    "P = 2": ("dense", "prefix", "prefix, T = 16", "long prefix", "twin", "average of 2"),
    "P = 2, T = 32": ("dense", "long prefix", "prefix, T = 64", "P = 2"),
    "P = 4, shared": ("dense", "prefix", "long prefix", "twin"),
    "P = 4, shared-own": ("dense", "prefix", "long prefix", "twin"),
    "P = 4, shared-window=8": ("dense", "prefix", "long prefix", f"prefix, {WINDOW}", f"dense, {WINDOW}", "twin"),
    "P = 4, shared-prefix": ("dense", "prefix", "long prefix", "twin"),
    "P = 4, embedding": ("dense", "prefix", "long prefix", "prefix, embedding", "twin", "twice as wide"),
    "P = 4, embedding=shared": ("dense", "prefix", "long prefix", "prefix, embedding", "twin"),
    "P = 2, embedding": (
        "dense",
        "prefix",
        "long prefix",
        "prefix, embedding",
        "dense, embedding",
        "twin",
        "twice as wide",
    ),
    "P = 4, lora=4": ("dense", "prefix", "long prefix", "twin, lora=4", "twice as wide"),
    "prefix": ("dense",),
    "prefix, T = 16": ("dense", "prefix"),
    "prefix, T = 64": ("dense", "long prefix"),
    "long prefix": ("dense",),
    "prefix, embedding": ("dense", "prefix"),
    "dense, embedding": ("dense",),
    f"prefix, {WINDOW}": ("dense", "prefix"),
    f"dense, {WINDOW}": ("dense",),
    "twin": ("dense",),
    "twin, lora=4": ("dense",),
    "twice as wide": ("dense",),
    "average of 2": ("dense",),
    "average of 4": ("dense",),
}
SCRATCH_PAIRS |= {  # with the prefixes' length for a name, or the variant's
    f"P = 4, {changed}": ("dense", "prefix", "long prefix")
    for changed in (*LATER_VARIANTS, *(f"T = {length}" for length in PREFIX_LENGTHS))
}
OF_ONE_STREAM = {"embedding": "prefix, embedding", WINDOW: f"prefix, {WINDOW}"}  # by what the names of arms hold
PREFIX_NAMES = {8: "prefix", 32: "long prefix"}  # the lengths T and P * T of P = 4


def one_prefix(length: int) -> str:
    """How tables name one prefix of so many tokens."""
    return PREFIX_NAMES.get(length, f"prefix, T = {length}")


def needed_controls(arm: str) -> tuple[str, ...]:
    """What streams from scratch have to beat by the rule: the dense model, one prefix of T and one of P * T tokens."""
    streams = int(arm.removeprefix("P = ").partition(",")[0])
    length = int(arm.partition("T = ")[2] or 8)
    return ("dense", one_prefix(length), one_prefix(streams * length))


CONTROLS = {arm: needed_controls(arm) for arm in SCRATCH_PAIRS if arm.startswith("P")}
ONE_CACHE = ("shared", *SHARED_VARIANTS)
OF_AGGREGATOR, EVEN = "aggregator's rate", "even mixing"  # its own rate, and zero
RECYCLED_VARIANTS = (*ONE_CACHE, OF_AGGREGATOR, EVEN)
ENDINGS = ("", *(f", {variant}" for variant in RECYCLED_VARIANTS))  # of the names of recycled arms
CONTROLS |= {f"frozen{ending}": ("untouched", "alone", "prefix", "long-prefix") for ending in ENDINGS}
CONTROLS |= {
    f"streams-and-backbone{ending}": ("untouched", "alone", "prefix-and-backbone", "long-prefix-and-backbone")
    for ending in ENDINGS
}
CHOSEN = {  # arms and sizes that were chosen for the losses of their first seeds, and the seeds trained after that
    ("P = 2, embedding", "0.1M"): range(3, 8),
    ("P = 2", "0.7M"): range(1, 3),
    ("P = 4", "1.0M"): range(1, 8),
    ("P = 4", "0.4M"): range(1, 5),
}
CHOSEN_RECYCLED = ((4_000_000, 16_000_000), (1, 2))  # likewise of the recycled models whose backbone trains
AWAITED = {("P = 4", "0.4M"): 5, ("P = 4", "1.0M"): 8}  # seeds without which no gain is called; else two
AWAITED |= {(f"streams-and-backbone{ending}", f"P = {streams}"): 3 for ending in ENDINGS for streams in (2, 4)}
# Before these are held against controls at their best rates, none of them is called a gain.
UNCHECKED = tuple(f"streams-and-backbone, {variant}" for variant in (OF_AGGREGATOR, EVEN))
TASK_STREAMS = ("P = 4", "P = 2")
TASK_ARMS = ("dense", "P = 2", "P = 4", "prefix", "long prefix", "twin", "twice as wide")  # in the order of the table
BySeed = dict[int, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS / "evidence")
    parser.add_argument("--output", type=Path, default=RESULTS / "evidence.json")
    args = parser.parse_args()
    rows = read_rows(args.rows)
    comparisons = [*scratch_comparisons(rows), *recycled_comparisons(rows)]
    tasks = task_results(rows)
    report = {
        "rows": len(rows),
        "comparisons": comparisons,
        "mixing": mixing(rows),
        "tasks": tasks,
        "gains": gains(comparisons) + task_gains(tasks),
        "confirmation": confirmation(rows),
        "law": law(by_size(rows)),
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


def label(run: Run | TaskRun, width: int) -> str:
    """How tables name an arm of the models from scratch; `width` is the size's own."""
    changed = [run.variant] if run.variant else []
    if run.arm == "prefix":
        return ", ".join([one_prefix(run.prefix_length), *changed])
    if run.arm == "average":
        return f"average of {run.streams}"
    if run.arm == "twin":
        return ", ".join([run.arm, *changed])
    if run.hidden == 2 * width:
        return "twice as wide"
    if run.streams == 1:
        return ", ".join(["dense", *changed])
    lengths = [f"T = {run.prefix_length}"] if run.prefix_length != 8 else []
    return ", ".join([f"P = {run.streams}", *lengths, *changed])


def best_rates(groups: dict[str, dict[float, BySeed]]) -> dict[str, BySeed]:
    """Of each arm the rows at its best rate, on what is for tuning, over the seeds that all its rates have.

    A rate without the first seed is left out.
    """
    chosen = {}
    for name, by_rate in groups.items():
        first = min(min(of_seed) for of_seed in by_rate.values())
        usable = {rate: of_seed for rate, of_seed in by_rate.items() if first in of_seed}
        seeds = set.intersection(*map(set, usable.values()))
        rate = min(usable, key=lambda rate: fmean(tuning_loss(usable[rate][seed]) for seed in seeds))
        finished = {seed: row for seed, row in sorted(usable[rate].items()) if "test" in row}
        if finished:
            chosen[name] = finished
    return chosen


def by_size(rows: Rows) -> dict[str, dict[str, BySeed]]:
    """Rows from scratch by size, arm and seed, each arm at its best rate."""
    result = {}
    for size, (hidden, layers, tokens) in SIZES.items():
        groups: dict[str, dict[float, BySeed]] = {}
        for row in rows.values():
            if "text" not in row:
                continue
            run = Run(**row["run"])
            if run.hidden in (hidden, 2 * hidden) and (run.layers, run.tokens) == (layers, tokens):
                of_rate = groups.setdefault(label(run, hidden), {}).setdefault(run.learning_rate, {})
                of_rate[run.seed] = row
        if groups:
            result[size] = best_rates(groups)
    return result


def scratch_comparisons(rows: Rows) -> list[dict[str, Any]]:
    """Every arm from scratch against its controls, by size; and each variant against the method as published."""
    entries = []
    for size, arms in by_size(rows).items():
        pairs = [(arm, baseline) for arm, baselines in SCRATCH_PAIRS.items() for baseline in baselines]
        pairs += [(arm, "P = 4") for arm in arms if arm.startswith("P = 4,")]
        pairs += [(arm, "P = 4, shared") for arm in arms if arm.startswith("P = 4, shared-")]
        for arm, baseline in pairs:
            if arm in arms and baseline in arms:
                about = {"study": "scratch", "size": size, "text": "code", "tokens": SIZES[size][2]}
                entries += held_against(arm, baseline, arms[arm], arms[baseline], about)
    return entries


def confirmation(rows: Rows) -> list[dict[str, Any]]:
    """Arms that were chosen for their first seeds, over those alone that were trained after the choice."""
    entries, sizes = [], by_size(rows)
    for (chosen, size), seeds in CHOSEN.items():
        fresh = {arm: {s: row for s, row in found.items() if s in seeds} for arm, found in sizes.get(size, {}).items()}
        about = {"study": "scratch", "size": size, "text": "code", "tokens": SIZES[size][2]}
        for baseline in SCRATCH_PAIRS[chosen]:
            if fresh.get(chosen) and fresh.get(baseline):
                entries += held_against(chosen, baseline, fresh[chosen], fresh[baseline], about)
    budgets, seeds = CHOSEN_RECYCLED
    recycled = recycled_comparisons({name: row for name, row in rows.items() if row["run"]["seed"] in seeds})
    entries += [e for e in recycled if e["arm"] == "streams-and-backbone" and e["tokens"] in budgets]
    return entries + [e for e in recycled if e["arm"] == f"streams-and-backbone, {OF_AGGREGATOR}"]


def recycled_comparisons(rows: Rows) -> list[dict[str, Any]]:
    """Every arm of the recycled small model against its controls, by tokens and P; tuning seeds do not count.

    Raises:
        ValueError: an arm has two rows of one seed.
    """
    found: dict[tuple[int, int], dict[str, BySeed]] = {}
    runs = [(RecycleRun(**row["run"]), row) for row in rows.values() if "backbone_rate" in row["run"]]
    budgets = sorted({run.tokens for run, _ in runs if run.tokens})
    for run, row in runs:
        if run.seed >= 100:
            continue
        for tokens in [run.tokens] if run.tokens else budgets:
            for streams in [run.streams] if run.streams > 1 else (2, 4):
                arm = ", ".join(filter(None, (run.arm, variant(run))))
                of_arm = found.setdefault((tokens, streams), {}).setdefault(arm, {})
                if run.seed in of_arm:
                    names = " and ".join(RecycleRun(**each["run"]).name for each in (of_arm[run.seed], row))
                    raise ValueError(f"{names} are one arm with one seed: keep that at tuned rates, remove the other.")
                of_arm[run.seed] = row
    entries = []
    for (tokens, streams), arms in sorted(found.items()):
        pairs = [(arm, baseline) for arm, baselines in HELD_AGAINST.items() for baseline in baselines]
        pairs += [(f"{arm}, {changed}", baseline) for changed in RECYCLED_VARIANTS for arm, baseline in pairs]
        pairs += [(f"{arm}, {changed}", arm) for changed in RECYCLED_VARIANTS for arm in HELD_AGAINST]
        pairs += [(f"{arm}, {OF_AGGREGATOR}", f"{arm}, {EVEN}") for arm in HELD_AGAINST]
        pairs += [(f"{arm}, {kv}", f"{arm}, shared") for kv in SHARED_VARIANTS for arm in HELD_AGAINST]
        for arm, baseline in pairs:
            if arm in arms and baseline in arms:
                about = {"study": "recycling", "size": f"P = {streams}", "text": "code", "tokens": tokens}
                entries += held_against(arm, baseline, arms[arm], arms[baseline], about)
    return entries


def variant(run: RecycleRun) -> str | None:
    """How the name of a recycled arm ends; None where streams have caches of their own and one rate."""
    if run.kv != "own":
        return run.kv
    return None if run.aggregator_rate is None else OF_AGGREGATOR if run.aggregator_rate else EVEN


def held_against(
    arm: str, baseline: str, rows: BySeed, of_baseline: BySeed, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """One arm against another at both places, over the seeds that both have; what does not train has one for all."""
    if set(of_baseline) == {0} and baseline == "untouched":
        of_baseline = dict.fromkeys(rows, of_baseline[0])
    seeds = sorted(set(rows) & set(of_baseline))
    entries = []
    both = [{of_seed[seed].get("precision", "bfloat16") for seed in seeds} for of_seed in (rows, of_baseline)]
    about = about | {"precision": both[0].pop() if both[0] == both[1] and len(both[0]) == 1 else "mixed"}
    for where in ("beginning", "middle") if seeds else ():
        sides = [[of_seed[seed]["test"][where] for seed in seeds] for of_seed in (rows, of_baseline)]
        differences = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(*sides, strict=True)]
        losses = {"loss": fmean(map(fmean, sides[0])), "baseline_loss": fmean(map(fmean, sides[1]))}
        entries.append(
            {"arm": arm, "baseline": baseline, "where": where} | about | rounded(crossed_interval(differences)) | losses
        )
    return entries


def mixing(rows: Rows) -> list[dict[str, Any]]:
    """What became of the streams from scratch: how alike they are, and how much of the mixture the largest is.

    Beside them models that were trained apart and are averaged.

    Correlations are between the streams' token losses, weights the aggregator's means over tokens, and losses those of
    the best and the worst stream alone, the best less that of all together where rows tell it; all by seed, on 32
    windows from the middle of tuning documents.
    """
    entries = []
    for size, arms in by_size(rows).items():
        for arm, by_seed in arms.items():
            if arm.startswith(("P", "average")) and all("streams" in row for row in by_seed.values()):
                found = [row["streams"] for row in by_seed.values()]
                weights = [round(max(streams["weights"]), 3) for streams in found]
                correlations = [round(streams["correlation"], 3) for streams in found]
                alone = {
                    f"{name}_alone": [round(which(streams["losses"]), 2) for streams in found]
                    for name, which in (("best", min), ("worst", max))
                }
                entry = {"size": size, "arm": arm, "correlations": correlations, "largest_weights": weights}
                if all("mixed" in streams for streams in found):
                    entry["best_less_mixed"] = [
                        round(min(streams["losses"]) - streams["mixed"], 5) for streams in found
                    ]
                entries.append(entry | alone)
    return entries


def task_results(rows: Rows) -> list[dict[str, Any]]:
    """Of each task and arm, the share of right answers by seed, and the difference of P = 4 and 2 from it."""
    groups: dict[tuple[Any, ...], dict[str, dict[float, BySeed]]] = {}
    runs = [(TaskRun(**row["run"]), row) for row in rows.values() if "task" in row["run"]]
    for run, row in runs:
        if run.seed < 100:
            width = min(other.hidden for other, _ in runs if (other.task, other.level) == (run.task, run.level))
            by_arm = groups.setdefault((run.task, run.level, width, run.layers), {})
            by_arm.setdefault(label(run, width), {}).setdefault(run.learning_rate, {})[run.seed] = row
    results = []
    for (task, level, hidden, layers), by_arm in groups.items():
        arms = best_rates(by_arm)
        for arm, by_seed in sorted(arms.items(), key=lambda item: TASK_ARMS.index(item[0])):
            entry = {"task": task, "level": level, "hidden": hidden, "layers": layers, "arm": arm}
            first = next(iter(by_seed.values()))
            entry |= {"params": first["params"], "learning_rate": first["run"]["learning_rate"], "seeds": [*by_seed]}
            entry |= {what: [row["test"][what] for row in by_seed.values()] for what in ("exact", "tokens", "loss")}
            for other in TASK_STREAMS:
                seeds = sorted(set(by_seed) & set(arms.get(other, {})))
                if other != arm and len(seeds) > 1:
                    more = [arms[other][seed]["test"]["exact"] - by_seed[seed]["test"]["exact"] for seed in seeds]
                    entry[f"gain of {other}"] = over_seeds(more)
            results.append(entry)
    return results


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """The t interval over seeds of one figure of each."""
    interval = crossed_interval([values])
    return rounded(interval) | {"seeds": interval.documents, "documents": 1}


def gains(comparisons: Iterable[dict[str, Any]]) -> list[str]:
    """Where streams gain by the rule: against every control, in the middle, over two seeds or all that are awaited."""
    against: dict[tuple[str, str, int, str], dict[str, bool]] = {}
    for entry in comparisons:
        if entry["where"] == "middle":
            key = (entry["study"], entry["size"], entry["tokens"], entry["arm"])
            enough = entry["seeds"] >= AWAITED.get((entry["arm"], entry["size"]), 2)
            against.setdefault(key, {})[entry["baseline"]] = entry["high"] < 0 and enough
    found = []
    for (study, size, tokens, arm), beaten in against.items():
        needed = [*CONTROLS.get(arm, ()), *(control for variant, control in OF_ONE_STREAM.items() if variant in arm)]
        if arm in CONTROLS and arm not in UNCHECKED and all(beaten.get(control, False) for control in needed):
            found.append(f"{study}, {size}, {tokens:,} tokens: {arm}")
    return found


def task_gains(tasks: Iterable[dict[str, Any]]) -> list[str]:
    """The tasks of which streams answer more than the dense model and one prefix of either length, over the seeds."""
    ahead: dict[tuple[str, int, str], dict[str, bool]] = {}
    for entry in tasks:
        for arm in TASK_STREAMS:
            if gain := entry.get(f"gain of {arm}"):
                ahead.setdefault((entry["task"], entry["level"], arm), {})[entry["arm"]] = gain["low"] > 0
    return [
        f"{task} {level}: {arm}"
        for (task, level, arm), beaten in ahead.items()
        if all(beaten.get(control, False) for control in CONTROLS[arm])
    ]


def rounded(interval: Interval) -> dict[str, Any]:
    """As a row of the report."""
    values = asdict(interval)
    return values | {name: round(values[name], 5) for name in ("difference", "low", "high")}


def markdown(report: dict[str, Any]) -> str:
    """The same as tables for a reader."""
    lines = [
        "# What streams are worth: all comparisons",
        "",
        "Made by `benchmarks/evidence/report.py` from the rows beside it; what counts as a gain is in",
        "`benchmarks/evidence/RULE.md`. Differences of loss in nats for each byte (from scratch) or token (recycling),",
        "negative is better for the arm; intervals are 95 %, over documents and, with two seeds or more, over seeds.",
        "",
        "Gains by the rule: " + ("; ".join(report["gains"]) or "none so far") + ".",
        "",
        law_sentence(report["law"]),
        "",
    ]
    tables: dict[tuple[str, str, int], dict[tuple[str, ...], dict[str, str]]] = {}
    for entry in report["comparisons"]:
        cells = tables.setdefault((entry["study"], entry["size"], entry["tokens"]), {})
        key = tuple(str(entry[name]) for name in ("arm", "baseline", "seeds", "precision"))
        cells.setdefault(key, {})[entry["where"]] = format_interval(entry)
    for (study, size, tokens), cells in tables.items():
        what = f"From scratch, {size}" if study == "scratch" else f"Recycled, {size}"
        lines += ["", f"## {what}, {tokens / 1e6:g} million {'bytes' if study == 'scratch' else 'tokens'}", ""]
        lines += [*_row("arm", "against", "beginning", "middle", "seeds", "precision"), *_row(*["---"] * 6)]
        for (arm, baseline, *rest), places in cells.items():
            lines += _row(arm, baseline, places.get("beginning", ""), places.get("middle", ""), *rest)
    lines += ["", "## Arms that were chosen for their first seeds, over those alone that were trained afterwards", ""]
    lines += [*_row("size", "arm", "against", "beginning", "middle", "seeds"), *_row(*["---"] * 6)]
    found = {
        tuple(entry[name] for name in ("size", "arm", "baseline", "where")): entry for entry in report["confirmation"]
    }
    for key in dict.fromkeys(key[:3] for key in found):
        shown = [found[*key, where] for where in ("beginning", "middle")]
        lines += _row(*key, *map(format_interval, shown), str(shown[0]["seeds"]))
    about = (
        "By seed: the correlation of the streams' token losses, the mean weight of the largest (of four streams at "
        "most 0.925, of two 0.95), the losses of the best and the worst stream alone, and how much more the best loses "
        "than all together (where it was measured); 32 windows of tuning documents."
    )
    lines += ["", "## What became of the streams", "", about, ""]
    columns = {  # with their digits
        "correlation": ("correlations", 2),
        "largest mean weight": ("largest_weights", 2),
        "best alone": ("best_alone", 2),
        "worst alone": ("worst_alone", 2),
        "best alone less all together": ("best_less_mixed", 4),
    }
    lines += [*_row("size", "arm", *columns), *_row(*["---"] * (2 + len(columns)))]
    for entry in report["mixing"]:
        of_seeds = [
            ", ".join(f"{value:.{digits}f}" for value in entry.get(name, ())) for name, digits in columns.values()
        ]
        lines += _row(entry["size"], entry["arm"], *of_seeds)
    lines += ["", "## Tasks", "", "Right answers as a whole, by seed, and how many more streams get.", ""]
    heads = ("task", "width, layers", "arm", "parameters", "right", *(f"{arm} more" for arm in TASK_STREAMS))
    lines += [*_row(*heads), *_row(*["---"] * len(heads))]
    for entry in report["tasks"]:
        gained = [entry.get(f"gain of {arm}") for arm in TASK_STREAMS]
        more = ["{difference:+.3f} ({low:+.3f}, {high:+.3f})".format(**gain) if gain else "" for gain in gained]
        exact = ", ".join(f"{value:.3f}" for value in entry["exact"])
        shape = f"{entry['hidden']}, {entry['layers']}"
        lines += _row(f"{entry['task']} {entry['level']}", shape, entry["arm"], f"{entry['params']:,}", exact, *more)
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |"]


if __name__ == "__main__":
    main()
