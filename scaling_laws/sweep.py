"""A sweep: small models trained over sizes and P on real text, one row for each run, then a fit.

Each model is a Qwen2 of bytes, trained from scratch with its streams, for one pass over the same text in the same
order; its loss is that on held-out text. A folder holds `runs.csv`, a row for each finished run, in the columns that
`parscale law fit` reads. When it is started again, the sweep runs only what is missing.

The function that adds streams is an argument, `wrap`: this package does not depend on the model. `parscale law sweep`
passes `parscale.wrap`. torch and transformers are imported when a run starts.
"""

from __future__ import annotations

import csv
import io
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parscale.scaling_laws.corpus import VOCABULARY_SIZE, Corpus, blocks, read_corpus
from parscale.scaling_laws.data import COLUMNS
from parscale.scaling_laws.files import read_table

Wrap = Callable[..., Any]
Report = Callable[["Run", float], None]
RUNS = "runs.csv"
MEASURED_BYTES = 200_000


@dataclass(frozen=True)
class Run:
    """One model to train."""

    hidden: int
    """Hidden size; heads have size 16 or 32, and the MLP is 8/3 times as wide as the model."""
    layers: int
    streams: int
    tokens: int
    """Training tokens: bytes of text."""
    seed: int = 0
    sequence_length: int = 256
    batch_size: int = 8
    """Sequences in a step."""
    prefix_length: int = 8
    learning_rate: float = 4e-3
    """Peak learning rate up to a hidden size of 64; beyond, it falls with the inverse of the size."""
    source: str = "stdlib"
    """The source of the text; see `read_corpus`."""

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return max(1, self.tokens // (self.sequence_length * self.batch_size))


@dataclass(frozen=True)
class Row:
    """One finished run: the values for a fit, its settings, and its cost."""

    params: int
    """Non-embedding parameters, including those of the streams."""
    streams: int
    loss: float
    """Loss on held-out text, in nats per byte."""
    tokens: int
    hidden: int
    layers: int
    seed: int
    sequence_length: int
    batch_size: int
    prefix_length: int
    learning_rate: float
    source: str
    seconds: float
    device: str

    def run(self) -> Run:
        """The run of this row."""
        return Run(**{field.name: getattr(self, field.name) for field in fields(Run)})


def plan(
    sizes: Iterable[tuple[int, int]], streams: Iterable[int], tokens: int, seeds: Iterable[int] = (0,), **settings: Any
) -> list[Run]:
    """Every size, as (hidden, layers), with every P and seed; cheapest first."""
    seeds, streams = tuple(seeds), tuple(streams)
    runs = [Run(h, depth, p, tokens, seed, **settings) for h, depth in sizes for p in streams for seed in seeds]
    return sorted(runs, key=lambda run: run.layers * run.hidden**2 * run.streams)


PRESETS: dict[str, Callable[[str], list[Run]]] = {
    "smoke": lambda source: plan(
        [(16, 2), (32, 2), (48, 2), (64, 2)],
        (1, 2, 4),
        1_000_000,
        seeds=(0, 1),
        sequence_length=128,
        batch_size=4,
        learning_rate=8e-3,
        source=source,
    ),
    "gpu": lambda source: plan(
        [(128, 6), (192, 6), (256, 8), (384, 8), (512, 8)],
        (1, 2, 4, 8),
        32_000_000,
        seeds=(0, 1),
        batch_size=64,
        sequence_length=512,
        prefix_length=48,
        learning_rate=6e-3,
        source=source,
    ),
}
"""`smoke`: 24 runs of 6 to 104 thousand parameters, half an hour on one CPU core; `gpu`: forty of 1 to 25 million."""


def sweep(
    runs: Sequence[Run],
    folder: str | Path,
    wrap: Wrap,
    *,
    workers: int | None = None,
    on_ray: bool = False,
    report: Report | None = None,
) -> list[Row]:
    """Trains the missing `runs` and returns all rows, in order; appends each to `folder/runs.csv`.

    Args:
        runs: to train; those that `runs.csv` has are not trained again.
        folder: where `runs.csv` lies, or will.
        wrap: called as `wrap(model, P, prefix_length=T, init="random", seed=s)`.
        workers: parallel runs, spread over the GPUs; by default one for each GPU, or one.
        on_ray: each run is a task of Ray, on one GPU where its cluster has any, else on one core; the cluster is the
            one that this process or machine is connected to, or this machine.
        report: called with a run and its completed share; with each run once everything has been checked.

    Raises:
        ValueError: runs have too little text or different sources, `runs.csv` is damaged, or `on_ray` comes with
            `workers` or without Ray.
        ChildProcessError: a worker is killed.
    """
    if on_ray:
        _require_ray(workers)
    sources = {run.source for run in runs}
    if len(sources) != 1:
        raise ValueError(f"one sweep reads one text; these runs name {', '.join(sorted(sources)) or 'none'}")
    folder = Path(folder)
    done = {row.run(): row for row in read_rows(folder / RUNS)}
    missing = [run for run in runs if run not in done]
    if missing:
        corpus = read_corpus(sources.pop())
        longest = max(run.tokens for run in missing)
        if corpus.train.size < longest:
            raise ValueError(
                f"the text has {corpus.train.size:,} bytes to train on, but a run needs {longest:,}: give a "
                "larger source, such as packages"
            )
    if report is not None:
        for run in runs:
            report(run, 1.0 if run in done else 0.0)
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        finished: Iterable[Row]
        if on_ray:
            finished = _train_on_ray(missing, corpus, wrap, report)
        else:
            finished = _train_all(missing, corpus, wrap, workers, report)
        for row in finished:
            done[row.run()] = row
            write_rows(folder / RUNS, done.values())
    return [done[run] for run in runs]


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a `runs.csv`; an empty list if the file does not exist. Raises `ValueError` if it is damaged."""
    path = Path(path)
    if not path.exists():
        return []
    kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
    rows = []
    for where, cells in read_table(path, COLUMNS):
        try:
            rows.append(Row(**{field.name: kinds[str(field.type)](cells[field.name]) for field in fields(Row)}))
        except (KeyError, ValueError):
            raise ValueError(f"{where} is not a row of a sweep; delete the line to repeat its run") from None
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes all rows; the file is always completely old or completely new."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text.getvalue(), encoding="utf-8")
    partial.replace(path)


def _train_all(
    runs: Sequence[Run], corpus: Corpus, wrap: Wrap, workers: int | None, report: Report | None
) -> Iterable[Row]:
    import torch

    gpus = torch.cuda.device_count()
    workers = workers or max(1, gpus)
    devices = [f"cuda:{index}" for index in range(gpus)] or ["cpu"]
    if workers == 1:
        for run in runs:
            yield train(run, corpus, wrap, devices[0], report)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = get_context("spawn")
    waiting = context.Queue()
    for index in range(workers):
        waiting.put(devices[index % len(devices)])
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(waiting, corpus, threads)) as pool:
        futures = {pool.submit(_train_in_worker, run, wrap): run for run in runs}
        try:
            for future in as_completed(futures):
                if report is not None:
                    report(futures[future], 1.0)
                yield future.result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a process of the sweep was killed, perhaps by a lack of memory; finished runs are kept: start the "
                "sweep again, with fewer workers, to continue it"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_worker: dict[str, Any] = {}


def _start_worker(waiting: Queue[str], corpus: Corpus, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    _worker.update(device=waiting.get(), corpus=corpus)


def _train_in_worker(run: Run, wrap: Wrap) -> Row:
    return train(run, _worker["corpus"], wrap, _worker["device"], None)


def _require_ray(workers: int | None) -> None:
    """Raises `ValueError` if Ray is not installed, or if a number of workers is given as well."""
    if workers is not None:
        raise ValueError(
            f"A Ray cluster says how many runs go at a time: give either the number of workers, {workers}, or Ray."
        )
    if find_spec("ray") is None:
        raise ValueError("Runs on many machines need the package ray: pip install 'parscale[ray]'.")


def _train_on_ray(runs: Sequence[Run], corpus: Corpus, wrap: Wrap, report: Report | None) -> Iterator[Row]:
    import ray

    is_connected = ray.is_initialized()
    if not is_connected:
        ray.init(log_to_driver=False, logging_level="ERROR")
    has_gpus = ray.cluster_resources().get("GPU", 0) >= 1
    task = ray.remote(train).options(num_cpus=1, num_gpus=1 if has_gpus else 0)
    text = ray.put(corpus)
    waiting = {task.remote(run, text, wrap, "cuda:0" if has_gpus else "cpu"): run for run in runs}
    try:
        while waiting:
            (finished,), _ = ray.wait(list(waiting))
            row = ray.get(finished)
            run = waiting.pop(finished)
            if report is not None:
                report(run, 1.0)
            yield row
    except ray.exceptions.RayTaskError as error:  # an error of the run itself
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise ChildProcessError(
            f"Ray lost a run of the sweep ({type(error).__name__}); finished runs are kept: start the sweep again to "
            "continue it"
        ) from error
    finally:
        for each in waiting:
            ray.cancel(each, force=True)
        if not is_connected:
            ray.shutdown()


def train(run: Run, corpus: Corpus, wrap: Wrap, device: str = "cpu", report: Report | None = None) -> Row:
    """Trains one model from scratch and evaluates it; repeatable on one kind of device.

    Weights start from a normal distribution with standard deviation `hidden**-0.5`. AdamW; the learning rate rises over
    a twentieth of the steps and falls to zero along a cosine. On a GPU in bfloat16.
    """
    import torch

    started = time.perf_counter()
    torch.manual_seed(run.seed)
    model = wrap(_new_model(run), run.streams, prefix_length=run.prefix_length, init="random", seed=run.seed)
    model = model.to(device).train()
    embedding = model.get_input_embeddings().weight.numel()
    params = sum(parameter.numel() for parameter in model.parameters()) - embedding
    rate = run.learning_rate * min(1.0, 64 / run.hidden)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    warmup = max(1, run.steps // 20)
    text = blocks(corpus.train, run.sequence_length)
    order = np.random.default_rng(run.seed).permutation(len(text))
    autocast = torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=device != "cpu")
    for step in range(run.steps):
        at = step / max(1, run.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * at)))
        batch = _batch(text, order[step * run.batch_size : (step + 1) * run.batch_size], device)
        with autocast:
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if report is not None:
            report(run, (step + 1) / run.steps)
    with autocast:
        held_out = evaluate(model, corpus, run, device)
    if not math.isfinite(held_out):
        raise ValueError(f"{run} did not train: its loss is {held_out}; give it a lower learning rate")
    kept = {field.name: getattr(run, field.name) for field in fields(Run)}
    return Row(params=params, loss=held_out, seconds=round(time.perf_counter() - started, 2), device=device, **kept)


def evaluate(model: Any, corpus: Corpus, run: Run, device: str) -> float:
    """Mean loss in nats per byte, on the first `MEASURED_BYTES` of held-out text, the same for every run."""
    import torch

    model.eval()
    text = blocks(corpus.held_out[:MEASURED_BYTES], run.sequence_length)
    if not len(text):
        raise ValueError(
            f"the held-out text has {corpus.held_out.size:,} bytes, fewer than a sequence of {run.sequence_length}: "
            "give a larger source"
        )
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(text), 2 * run.batch_size):
            batch = _batch(text, np.arange(start, min(start + 2 * run.batch_size, len(text))), device)
            total += float(model(input_ids=batch, labels=batch, use_cache=False).loss) * len(batch)
    return total / len(text)


def _batch(text: NDArray[np.uint8], rows: NDArray[np.int64], device: str) -> Any:
    import torch

    return torch.from_numpy(text[rows].astype(np.int64)).to(device)


def _new_model(run: Run) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    head = 16 if run.hidden < 128 else 32
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=run.hidden,
        intermediate_size=8 * round(run.hidden / 3),
        num_hidden_layers=run.layers,
        num_attention_heads=run.hidden // head,
        num_key_value_heads=1,
        max_position_embeddings=run.sequence_length,
        tie_word_embeddings=True,
        initializer_range=run.hidden**-0.5,
        bos_token_id=None,
        eos_token_id=0,
    )
    return Qwen2ForCausalLM(config)
