"""Which models the study trains, in the order of what they tell for the hours they take."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from arms import Run, as_run

SIZES = {  # by name: width, layers, training tokens
    "0.1M": (48, 4, 2_500_000),
    "0.2M": (64, 5, 5_400_000),
    "0.4M": (80, 6, 9_700_000),
    "0.7M": (96, 7, 16_600_000),
    "1.0M": (128, 6, 25_000_000),
}
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
VARIANTS = ("draw=7", "embedding", "probabilities", "left-out", "apart=0.1", "lora=4", "draw=3", "rate=3", "rate=0.3")
PREFIX_LENGTHS = (2, 32)  # besides 8
Rows = dict[str, dict[str, Any]]


def read_rows(folder: Path) -> Rows:
    """All finished rows by their runs' names."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("[!.]*.json"))}


def plan(rows: Rows) -> list[Run]:
    """Every run that can be named yet, those that are finished too: the study follows once its rates are tuned."""
    tuning = {streams: _tuned(rows, streams) for streams in (1, 4)}
    rates = {streams: rate for streams, (_, rate) in tuning.items() if rate is not None}
    runs = [run for tuned, _ in tuning.values() for run in tuned]
    if len(rates) == 2:
        runs += _study(rows, rates)
    return list(dict.fromkeys(runs))


def _tuned(rows: Rows, streams: int) -> tuple[list[Run], float | None]:
    """The tuning runs at the smallest size, and the best rate once it is known; the grid grows while its end wins."""
    hidden, layers, tokens = SIZES["0.1M"]
    rates = list(RATES)
    while True:
        runs = [Run(hidden, layers, streams, tokens, 0, rate) for rate in rates]
        best = best_of(rows, runs)
        if best is None:
            return runs, None
        if best is runs[-1]:
            rates.append(2 * rates[-1])
        elif best is runs[0]:
            rates.insert(0, rates[0] / 2)
        else:
            return runs, best.learning_rate


def best_of(rows: Rows, runs: Sequence[Run]) -> Run | None:
    """The run with the lowest loss on tuning documents; None until all are finished."""
    if any(run.name not in rows for run in runs):
        return None
    return min(runs, key=lambda run: fmean(rows[run.name]["tuning"]["middle"]))


def _study(rows: Rows, rates: dict[int, float]) -> Iterator[Run]:
    for seed in (0, 1, 2):
        yield from arms("0.1M", seed, rates)
    for seed in (0, 1):
        yield from arms("0.2M", seed, rates)
    for seed in (0, 1):
        yield from variants(seed, rates)
    yield from arms("0.4M", 0, rates)
    for streams in (1, 4):
        run = _run("0.4M", 0, rates, streams)
        yield from (replace(run, learning_rate=factor * run.learning_rate) for factor in (0.5, 2))
    for seed in (3, 4):
        yield from arms("0.1M", seed, rates)
    yield from arms("0.4M", 1, rates)
    yield from arms("0.2M", 2, rates)
    yield from arms("0.7M", 0, rates)
    yield from arms("1.0M", 0, rates)
    yield from arms("0.7M", 1, rates)
    yield from arms("1.0M", 1, rates)


def arms(size: str, seed: int, rates: dict[int, float]) -> Iterator[Run]:
    """All arms of one size and seed: dense, streams, one prefix of T and 4 * T, equal parameters, equal compute."""
    dense, four = _run(size, seed, rates, 1), _run(size, seed, rates, 4)
    yield from (dense, four, replace(four, streams=2))
    for prefix_length in (8, 32):
        yield replace(dense, arm="prefix", prefix_length=prefix_length)
    yield replace(four, arm="twin", learning_rate=dense.learning_rate)
    yield replace(dense, hidden=2 * dense.hidden)


def variants(seed: int, rates: dict[int, float]) -> Iterator[Run]:
    """What could make streams pay sooner, at the smallest size."""
    four = _run("0.1M", seed, rates, 4)
    yield from (replace(four, variant=variant) for variant in VARIANTS)
    yield from (replace(four, prefix_length=prefix_length) for prefix_length in PREFIX_LENGTHS)


def _run(size: str, seed: int, rates: dict[int, float], streams: int) -> Run:
    hidden, layers, tokens = SIZES[size]
    return Run(hidden, layers, streams, tokens, seed, rates[streams])


def of_row(row: dict[str, Any]) -> Run:
    """The run of a row."""
    return as_run(row["run"])
