"""Which models the study trains, in the order of what they tell for the hours they take."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice, product
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from arms import Run
from ensembles import EnsembleRun
from recycling import RecycleRun
from synthetic import TaskRun

SIZES = {  # by name: width, layers, training tokens
    "0.1M": (48, 4, 2_500_000),
    "0.2M": (64, 5, 5_400_000),
    "0.4M": (80, 6, 9_700_000),
    "0.7M": (96, 7, 16_600_000),
    "1.0M": (128, 6, 25_000_000),
    "2.7M": (256, 4, 12_000_000),  # the width and depth of the package's small model
    "21M": (512, 8, 100_000_000),  # on a GPU
}
FIRST_RATE = 8e-3
FIRST_VARIANTS = ("draw=7", "embedding", "lora=4")
LATER_VARIANTS = ("smoothing=1", "left-out", "apart=0.1", "probabilities", "rate=0.3", "rate=3", "draw=3")
SHARED_VARIANTS = ("shared-window=8", "shared-own", "shared-prefix")
PREFIX_LENGTHS = (2, 32)  # besides 8
TASKS = (("add", 5, 32, 1), ("sort", 10, 32, 1), ("multiply", 2, 48, 2))  # with their levels, widths and layers
UNLEARNED = (("hops", 2, 48, 2), ("parity", 2, 48, 2))  # at chance with P = 1
TASK_STEPS, TASK_SEEDS, TUNING_SEED = 2000, 6, 100
RECYCLED_TOKENS = 250_000  # at which its rates are tuned
FIRST_AGGREGATOR_RATE = 1e-3
WITH_BACKBONE = ("streams-and-backbone", "prefix-and-backbone", "alone", "long-prefix-and-backbone")
FROZEN = ("frozen", "long-prefix", "prefix")
Rows = dict[str, dict[str, Any]]
AnyRun = Run | TaskRun | RecycleRun | EnsembleRun
R = TypeVar("R", Run, TaskRun)
T = TypeVar("T", Run, TaskRun, RecycleRun)


def read_rows(folder: Path) -> Rows:
    """All finished rows by their runs' names."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*/[!.]*.json"))}


def gpu_plan(rows: Rows) -> list[AnyRun]:
    """The same studies at the size of one GPU: 21 million parameters on 100 million bytes, 4 million tokens recycled.

    At the rates that the small models were tuned to, scaled by width; one seed.
    """
    dense = Run(512, 8, 1, 100_000_000, 0, FIRST_RATE, batch_size=128)
    four = replace(dense, streams=4)
    prefix = replace(dense, arm="prefix")
    runs: list[AnyRun] = [dense, four, prefix, replace(four, arm="twin"), replace(four, streams=2)]
    runs.append(replace(prefix, prefix_length=32))
    tokens, rate = 16 * RECYCLED_TOKENS, 0.16
    both = {"backbone_rate": 4e-4, "streams_rate": rate}
    runs += [
        RecycleRun("untouched", 1, 0, 0),
        RecycleRun("alone", 1, tokens, 0, 4e-4),
        RecycleRun("prefix", 1, tokens, 0, streams_rate=rate),
        RecycleRun("long-prefix", 4, tokens, 0, streams_rate=rate),
        RecycleRun("lora", 4, tokens, 0, 2e-3),
        RecycleRun("frozen", 4, tokens, 0, streams_rate=rate, aggregator_rate=FIRST_AGGREGATOR_RATE),
        RecycleRun("prefix-and-backbone", 1, tokens, 0, **both),
        RecycleRun("long-prefix-and-backbone", 4, tokens, 0, **both),
        RecycleRun("streams-and-backbone", 4, tokens, 0, **both, aggregator_rate=FIRST_AGGREGATOR_RATE),
        RecycleRun("streams-and-backbone", 2, tokens, 0, **both, aggregator_rate=FIRST_AGGREGATOR_RATE),
    ]
    return runs


def plan(rows: Rows) -> list[AnyRun]:
    """Every run that can be named yet, those that are finished too: the study follows once its rates are tuned."""
    runs: list[AnyRun] = []
    rates: dict[int, float] = {}
    for streams in (1, 4):
        hidden, layers, tokens = SIZES["0.1M"]
        first = Run(hidden, layers, streams, tokens, 0, FIRST_RATE)
        needed, best = tuned(rows, first, tuning_loss)
        runs += needed
        if best is not None:
            rates[streams] = best.learning_rate
    runs += _study(rows, rates) if len(rates) == 2 else _tasks(rows)
    return list(dict.fromkeys(runs))


def tuning_loss(row: dict[str, Any]) -> float:
    """In the middle of tuning documents, or of a task's answers."""
    found = row["tuning"]
    return float(found["loss"]) if "loss" in found else fmean(found["middle"])


def tuned(
    rows: Rows, first: T, loss: Callable[[dict[str, Any]], float], rate: str = "learning_rate"
) -> tuple[list[T], T | None]:
    """The runs that find a learning rate, and the best: that with both neighbours, of a factor of two, tried and worse.

    None for the best while runs are missing.

    Args:
        rows: those that are finished.
        first: the run to begin with.
        loss: of a row, on what is for tuning.
        rate: the name of the rate.
    """
    runs, best = [first], first
    while True:
        more = [replace(best, **{rate: factor * getattr(best, rate)}) for factor in (0.5, 2)]
        more = [run for run in more if run not in runs]
        if not more:
            return runs, best
        runs += more
        if any(run.name not in rows for run in runs):
            return runs, None
        best = min(runs, key=lambda run: loss(rows[run.name]))


def _study(rows: Rows, rates: dict[int, float]) -> Iterator[AnyRun]:
    for seed in (0, 1, 2):
        yield from arms("0.1M", seed, rates)
        yield shared("0.1M", seed, rates)
    for seed in range(3, 8):
        yield from decisive("0.1M", seed, rates)
    yield from islice(variants(0, rates), len(FIRST_VARIANTS))
    for seed in (1, 2, 0):
        yield from embedded("0.1M", seed, rates)
        yield from low_rank("0.1M", seed, rates)
    for seed in range(8):
        yield from of_one_stream("0.1M", seed, rates, "embedding")
    two = replace(_run("0.1M", 0, rates, 4), streams=2, variant="embedding")
    yield from (replace(two, learning_rate=factor * two.learning_rate) for factor in (0.5, 2))
    for seed in range(3):
        yield from of_one_stream("0.1M", seed, rates, "shared-window=8")
    one_cache = [replace(_run("0.1M", seed, rates, 4), variant=name) for name in SHARED_VARIANTS for seed in range(3)]
    yield from one_cache[:3]
    yield from _averages(rows, rates)
    yield from islice(arms("0.7M", 0, rates), 6)
    for seed in (1, 2, 0):
        yield from of_two_streams("0.7M", seed, rates)
    yield from islice(arms("1.0M", 0, rates), 3)
    yield from of_two_streams("1.0M", 0, rates)
    yield from of_four_streams("1.0M", (1, 2), rates)
    yield from at_rates_of_its_own("0.4M", ((1, 2), (3, 4)), rows, rates)
    yield from _recycled_arms(WITH_BACKBONE, rows, 16 * RECYCLED_TOKENS, seeds=(0,))
    recycled = list(_recycled_arms(WITH_BACKBONE, rows, 16 * RECYCLED_TOKENS, seeds=(1, 2)))
    yield from (run for run in recycled if run.streams == 1)
    recycled_longest = list(_recycled_arms(WITH_BACKBONE, rows, 64 * RECYCLED_TOKENS, seeds=(0,)))
    yield from recycled_longest[:4]  # all but two streams
    yield from _with_aggregators_rate(rows, recycled)
    yield from _recycled_arms(FROZEN, rows, 4 * RECYCLED_TOKENS, seeds=(0,))
    yield from _recycled_arms(FROZEN, rows, 16 * RECYCLED_TOKENS, seeds=(0,))
    yield from recycled
    yield from recycled_longest
    yield from of_four_streams("2.7M", (0,), rates)
    yield from islice(arms("2.7M", 0, rates), 3)
    yield from at_rates_of_its_own("1.0M", ((1, 2), (3, 4), (5, 6), (7,)), rows, rates)
    at_twice = islice(of_four_streams("0.7M", (0,), rates), 4)
    yield from (replace(run, learning_rate=2 * run.learning_rate) for run in at_twice)
    yield from with_longer_prefixes("0.7M", 0, rates)
    yield from _recycled(rows, RECYCLED_TOKENS, seeds=(0,))
    for size in ("0.2M", "0.4M"):
        yield from islice(arms(size, 0, rates), 3)
    yield from _recycled(rows, RECYCLED_TOKENS, seeds=(1, 2))
    yield from one_cache
    yield from variants(0, rates)
    yield from _tasks(rows)
    for seed in range(3):
        yield from decisive("0.2M", seed, rates)
        yield from islice(of_one_stream("0.2M", seed, rates, "embedding"), 1)
    yield from arms("0.2M", 0, rates)
    yield shared("0.2M", 0, rates)
    yield from embedded("0.2M", 0, rates)
    yield from arms("0.2M", 1, rates)
    yield shared("0.2M", 1, rates)
    yield from embedded("0.2M", 1, rates)
    yield from arms("0.4M", 0, rates)
    yield shared("0.4M", 0, rates)
    yield from embedded("0.4M", 0, rates)
    for factor in (4, 16):
        yield from _recycled(rows, factor * RECYCLED_TOKENS, seeds=(0,))
    yield from variants(1, rates)
    for seed in (3, 4):
        yield from arms("0.1M", seed, rates)
    yield from _recycled(rows, 4 * RECYCLED_TOKENS, seeds=(1, 2))
    yield from arms("0.4M", 1, rates)
    yield from arms("0.2M", 2, rates)
    yield from arms("0.7M", 0, rates)
    yield from arms("1.0M", 0, rates)
    yield from arms("0.7M", 1, rates)
    yield from arms("1.0M", 1, rates)


def decisive(size: str, seed: int, rates: dict[int, float]) -> Iterator[Run]:
    """What the rule needs for two streams with a vector each: they, the dense model, a larger one, one prefix."""
    yield _run(size, seed, rates, 1)
    yield from (run for run in arms(size, seed, rates) if run.arm == "prefix")
    yield replace(_run(size, seed, rates, 4), streams=2, variant="embedding")
    yield replace(_run(size, seed, rates, 4), arm="twin", learning_rate=rates[1])


def of_two_streams(size: str, seed: int, rates: dict[int, float]) -> Iterator[Run]:
    """What the rule needs for two streams as published: they, the dense model, one prefix of each length, the twin."""
    dense, four = _run(size, seed, rates, 1), _run(size, seed, rates, 4)
    yield from (dense, replace(four, streams=2))
    yield from (replace(dense, arm="prefix", prefix_length=length) for length in (8, 16, 32))
    yield replace(four, arm="twin", learning_rate=dense.learning_rate)


def of_four_streams(size: str, seeds: Iterable[int], rates: dict[int, float]) -> Iterator[Run]:
    """What the rule needs for four streams as published, arm by arm: they take the longest and come first."""
    pairs = [(_run(size, seed, rates, 1), _run(size, seed, rates, 4)) for seed in seeds]
    yield from (four for _, four in pairs)
    yield from (dense for dense, _ in pairs)
    for length in (8, 32):
        yield from (replace(dense, arm="prefix", prefix_length=length) for dense, _ in pairs)
    yield from (replace(four, arm="twin", learning_rate=dense.learning_rate) for dense, four in pairs)


def at_rates_of_its_own(
    size: str, pairs_of_seeds: Iterable[tuple[int, ...]], rows: Rows, rates: dict[int, float]
) -> Iterator[Run]:
    """What the rule needs for four streams, at learning rates that are tuned at this size, with seed 0.

    Those of P = 1 and 4 as at the smallest size; one prefix and the twin take the best of P = 1's, twice that, and
    P = 4's.

    Args:
        size: of the models.
        pairs_of_seeds: the other ones, in their order.
        rows: those that are finished.
        rates: by P, of the smallest size.
    """
    found = {}
    for streams in (1, 4):
        needed, found[streams] = tuned(rows, _run(size, 0, rates, streams), tuning_loss)
        yield from needed
    dense, four = found[1], found[4]
    if dense is None:
        return
    prefixes = [replace(dense, arm="prefix", prefix_length=length) for length in (8, 32)]
    factors = (1, 2)
    yield from (replace(run, learning_rate=factor * run.learning_rate) for factor in factors for run in prefixes)
    if four is None:
        return
    tried = dict.fromkeys((*(factor * dense.learning_rate for factor in factors), four.learning_rate))
    controls = [[replace(run, learning_rate=rate) for rate in tried] for run in (*prefixes, replace(four, arm="twin"))]
    yield from chain(*controls)
    measured = [runs for runs in controls if all(run.name in rows for run in runs)]
    best = [min(runs, key=lambda run: tuning_loss(rows[run.name])) for runs in measured]
    for pair in pairs_of_seeds:
        yield from (replace(run, seed=seed) for run in (four, dense, *best) for seed in pair)
    yield replace(four, streams=2)


def with_longer_prefixes(size: str, seed: int, rates: dict[int, float]) -> Iterator[Run]:
    """Two streams with prefixes of 32 tokens, and one prefix of as many in all; `arms` has the one of 32."""
    yield replace(_run(size, seed, rates, 4), streams=2, prefix_length=32)
    yield replace(_run(size, seed, rates, 1), arm="prefix", prefix_length=64)


def of_one_stream(size: str, seed: int, rates: dict[int, float], variant: str) -> Iterator[Run]:
    """What one stream of a variant has: one prefix, and the vector or the window; and the dense model with that."""
    dense = replace(_run(size, seed, rates, 1), variant=variant)
    yield from (replace(dense, arm="prefix"), dense)


def embedded(size: str, seed: int, rates: dict[int, float]) -> Iterator[Run]:
    """A vector for each stream, added to its input: the variant that was ahead of the published method."""
    four = _run(size, seed, rates, 4)
    yield replace(four, variant="embedding")
    yield replace(four, variant="embedding=shared")
    yield replace(four, streams=2, variant="embedding")


def low_rank(size: str, seed: int, rates: dict[int, float]) -> Iterator[Run]:
    """Low-rank differences between streams in place of prefixes, and the dense twin of as many parameters."""
    four = replace(_run(size, seed, rates, 4), variant="lora=4")
    yield four
    yield replace(four, arm="twin", learning_rate=rates[1])


def shared(size: str, seed: int, rates: dict[int, float]) -> Run:
    """P = 4 with one cache for all streams."""
    return replace(_run(size, seed, rates, 4), variant="shared")


def arms(size: str, seed: int, rates: dict[int, float]) -> Iterator[Run]:
    """All arms of one size and seed: dense, streams, one prefix of T and 4 * T, equal parameters, equal compute."""
    return _arms(_run(size, seed, rates, 1), _run(size, seed, rates, 4))


def _arms(dense: R, four: R) -> Iterator[R]:
    yield from (dense, four, replace(four, streams=2))
    for rate in dict.fromkeys((dense.learning_rate, four.learning_rate)):  # the better one counts
        for prefix_length in (8, 32):
            yield replace(dense, arm="prefix", prefix_length=prefix_length, learning_rate=rate)
    yield replace(four, arm="twin", learning_rate=dense.learning_rate)
    yield replace(dense, hidden=2 * dense.hidden)


def _averages(rows: Rows, rates: dict[int, float]) -> Iterator[EnsembleRun]:
    """Of each seed's dense model and those of the next seeds: as many as P, of those that are finished."""
    for size, seeds, models in (("0.1M", 5, 4), ("0.7M", 3, 2)):
        dense = _run(size, 0, rates, 1)
        if all(replace(dense, seed=seed).name in rows for seed in range(seeds)):
            for seed in range(seeds):
                yield EnsembleRun(dense, tuple((seed + number) % seeds for number in range(models)))


def variants(seed: int, rates: dict[int, float]) -> Iterator[Run]:
    """What could make streams pay sooner, at the smallest size."""
    four = _run("0.1M", seed, rates, 4)
    yield from (replace(four, variant=variant) for variant in FIRST_VARIANTS + LATER_VARIANTS)
    yield from (replace(four, prefix_length=prefix_length) for prefix_length in PREFIX_LENGTHS)


def _run(size: str, seed: int, rates: dict[int, float], streams: int) -> Run:
    hidden, layers, tokens = SIZES[size]
    return Run(hidden, layers, streams, tokens, seed, rates[streams])


def _tasks(rows: Rows) -> Iterator[TaskRun]:
    """Each task: its rates, then all arms and seeds."""
    for task in TASKS:
        rates = {}
        for streams in (1, 4):
            first = TaskRun(*task, streams, TASK_STEPS, TUNING_SEED, FIRST_RATE)
            needed, best = tuned(rows, first, tuning_loss)
            yield from needed
            if best is not None:
                rates[streams] = best.learning_rate
        if len(rates) == 2:
            for seed in range(TASK_SEEDS):
                dense, four = (TaskRun(*task, streams, TASK_STEPS, seed, rates[streams]) for streams in (1, 4))
                yield from _arms(dense, four)
    for task in UNLEARNED:
        yield from _arms(*(TaskRun(*task, streams, TASK_STEPS, 0, FIRST_RATE) for streams in (1, 4)))


def _recycled_arms(names: Iterable[str], rows: Rows, tokens: int, seeds: Iterable[int]) -> Iterator[RecycleRun]:
    """Those of one budget with these names, in their order; two streams come last."""
    runs = [run for run in _recycled(rows, tokens, seeds) if run.tokens == tokens]
    in_order = [run for name in names for run in runs if run.arm == name]
    yield from sorted(in_order, key=lambda run: run.streams == 2)


def _with_aggregators_rate(rows: Rows, controls: Iterable[RecycleRun]) -> Iterator[RecycleRun]:
    """P = 4 with a learning rate of the aggregator's own, tuned at the smallest budget; then the longer budgets.

    Args:
        rows: those that are finished.
        controls: of four million tokens with seeds 1 and 2, of which one prefix of P * T tokens is needed.
    """
    best: dict[str, RecycleRun | None] = {}
    for name in ("streams-and-backbone", "frozen"):
        for run in _recycled_arms((name,), rows, RECYCLED_TOKENS, seeds=(0,)):
            if run.seed == 0 and run.streams == 4 and run.kv == "own":
                first = replace(run, seed=TUNING_SEED, aggregator_rate=FIRST_AGGREGATOR_RATE)
                needed, best[name] = tuned(rows, first, tuning_loss, "aggregator_rate")
                yield from needed
    found = [run for run in best.values() if run is not None]
    for seed, run in product(range(3), found):
        yield replace(run, seed=seed)
    both = best.get("streams-and-backbone")
    if both is not None:
        yield from _at_other_rates(rows, both)
        yield replace(both, tokens=4 * RECYCLED_TOKENS, seed=0)
        yield from (replace(both, tokens=16 * RECYCLED_TOKENS, seed=seed) for seed in range(3))
        yield from (control for control in controls if control.arm == "long-prefix-and-backbone")
        yield replace(both, tokens=64 * RECYCLED_TOKENS, seed=0)
    for seed, run in product(range(3), found):
        yield replace(run, seed=seed, aggregator_rate=0.0)


def _at_other_rates(rows: Rows, streams: RecycleRun) -> Iterator[RecycleRun]:
    """One prefix of T and of P * T tokens, and streams, tuned in each of both rates with the backbone."""
    longer = replace(streams, arm="long-prefix-and-backbone", aggregator_rate=None)
    prefix = replace(longer, arm="prefix-and-backbone", streams=1)
    for run, rate in product((prefix, longer, streams), ("backbone_rate", "streams_rate")):
        needed, _ = tuned(rows, run, tuning_loss, rate)
        yield from needed


def _recycled(rows: Rows, tokens: int, seeds: Iterable[int]) -> Iterator[RecycleRun]:
    """The small model's arms at one budget, at rates that are tuned at the smallest; P = 2 and 4."""
    best = {}
    for arm, streams, backbone_rate, streams_rate in (
        ("alone", 4, 4e-4, 0.0),
        ("prefix", 4, 0.0, 2e-2),
        ("frozen", 4, 0.0, 2e-2),
        ("lora", 4, 2e-3, 0.0),
    ):
        first = RecycleRun(arm, streams, RECYCLED_TOKENS, TUNING_SEED, backbone_rate, streams_rate)
        rate = "backbone_rate" if backbone_rate else "streams_rate"
        needed, best[arm] = tuned(rows, first, tuning_loss, rate)
        yield from needed
    alone, prefix, frozen, lora = (best[arm] for arm in ("alone", "prefix", "frozen", "lora"))
    if alone is None or prefix is None or frozen is None or lora is None:
        return
    backbone, both = alone.backbone_rate, {"backbone_rate": alone.backbone_rate}
    for seed in seeds:
        yield RecycleRun("untouched", 1, 0, 0)
        for streams in (4, 2):
            yield RecycleRun("untrained", streams, 0, seed)
        yield RecycleRun("alone", 1, tokens, seed, backbone)
        yield RecycleRun("prefix", 1, tokens, seed, streams_rate=prefix.streams_rate)
        for streams in (4, 2):
            yield RecycleRun("frozen", streams, tokens, seed, streams_rate=frozen.streams_rate)
            yield RecycleRun("streams-and-backbone", streams, tokens, seed, streams_rate=frozen.streams_rate, **both)
        yield RecycleRun("prefix-and-backbone", 1, tokens, seed, streams_rate=prefix.streams_rate, **both)
        yield RecycleRun("long-prefix", 4, tokens, seed, streams_rate=prefix.streams_rate)
        yield RecycleRun("long-prefix-and-backbone", 4, tokens, seed, streams_rate=prefix.streams_rate, **both)
        yield RecycleRun("lora", 4, tokens, seed, lora.backbone_rate)
        if tokens == RECYCLED_TOKENS:
            for kv in ("shared", *SHARED_VARIANTS):
                yield RecycleRun("frozen", 4, tokens, seed, streams_rate=frozen.streams_rate, kv=kv)
                yield RecycleRun(
                    "streams-and-backbone", 4, tokens, seed, streams_rate=frozen.streams_rate, kv=kv, **both
                )
