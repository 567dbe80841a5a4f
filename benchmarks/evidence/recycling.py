"""The package's small model recycled: one arm of the controls trained on packages' source, and measured by document.

The small model was pretrained on the standard library's source; the packages' source is new to it, and there is enough
for sixteen million tokens. All but the variants of one cache train through `parscale.checkpoints.train`, whose runs go
on after a kill.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import recycled_variants
import torch
from loop import DEVICE, PRECISION, autocast, write_row
from rich.console import Console
from text import read_sides
from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale import ParScaleConfig, wrap
from parscale.checkpoints import (
    ADAPTER,
    ARMS,
    BOTH,
    NOTHING,
    STREAMS,
    Arm,
    Document,
    TrainSettings,
    calibration_ids,
    evaluate_places,
    open_checkpoint,
    prepare_arm,
    rank_with_parameters,
    small_model_path,
)
from parscale.checkpoints import train as train_checkpoint

PREFIX_LENGTH, SEQUENCE_LENGTH, BATCH_SIZE = 48, 512, 4
TUNING_DOCUMENTS, TEST_DOCUMENTS, MIDDLES = 60, 200, 2
BYTES_PER_TOKEN = 5  # more than there are
ROUNDED = 5
UNTRAINED_FROM = 250_000  # tokens, whose texts untrained streams start from: the smallest budget's


@dataclass(frozen=True)
class RecycleRun:
    """One arm at one budget."""

    arm: str
    streams: int
    """P; it also says how long `long-prefix` is, and how large the adapter."""
    tokens: int
    seed: int
    backbone_rate: float = 0.0
    """Of the backbone or the adapter, where one trains."""
    streams_rate: float = 0.0
    """Of prefixes, where they train."""
    aggregator_rate: float | None = None
    """Of the aggregator of streams; None for that of the prefixes, and where none trains."""
    kv: str = "own"
    """Of the streams, as in `parscale.wrap`; or a variant of one cache, by its name in `variants.py`."""

    @property
    def name(self) -> str:
        """Of its row and its folder; it tells every field."""
        rates = f"b{self.backbone_rate:g}-r{self.streams_rate:g}"
        rates += "" if self.aggregator_rate is None else f"-a{self.aggregator_rate:g}"
        name = f"recycle-{self.arm}-p{self.streams}-n{self.tokens}-{rates}-s{self.seed}"
        return name if self.kv == "own" else f"{name}-{self.kv.replace('=', '')}"

    @property
    def of_arm(self) -> Arm:
        """What is added, and what trains."""
        return next(arm for arm in ARMS if arm.name == self.arm)


def train(run: RecycleRun, work: Path, results: Path) -> dict[str, Any]:
    """Trains an arm, or goes on where it stood; its row is written to `results` when it is finished."""
    folder = work / run.name
    folder.mkdir(parents=True, exist_ok=True)
    start = _start(run, folder)
    report: dict[str, Any] = {}
    if is_variant(run.kv):
        model, tokenizer, report = _train_variant(run, start, folder)
    else:
        if run.of_arm.trains != NOTHING:
            report = train_checkpoint(
                str(start), folder / "trained", _settings(run, folder), resume=True, console=Console(quiet=True)
            )
        model, tokenizer = open_checkpoint(str(folder / "trained" if report else start))
        model = model.float().to(DEVICE)
    assert tokenizer is not None
    row = {
        "run": asdict(run),
        "trained_parameters": report.get("trained_parameters", 0),
        "losses": report.get("losses"),
        "seconds": report.get("seconds", 0),
    }
    for side, count in (("tuning", TUNING_DOCUMENTS), ("test", TEST_DOCUMENTS)):
        with autocast():
            measured = evaluate_places(
                model, tokenizer, _held_out(side, count), sequence_length=SEQUENCE_LENGTH, middles=MIDDLES
            )
        row[side] = {
            where: [round(document.loss, ROUNDED) for document in evaluation.documents]
            for where, evaluation in measured.items()
        }
    write_row(row, results / f"{run.name}.json")
    return row


def _start(run: RecycleRun, folder: Path) -> Path:
    """The checkpoint that training starts from: the small model with what the arm adds."""
    start = folder / "start"
    if not run.of_arm.streams and not run.of_arm.prefix:
        return small_model_path()
    if start.exists():
        return start
    tokenizer = AutoTokenizer.from_pretrained(small_model_path())
    model = AutoModelForCausalLM.from_pretrained(small_model_path(), dtype=torch.float32)
    config = ParScaleConfig(run.streams, PREFIX_LENGTH, seed=run.seed, kv="shared" if is_variant(run.kv) else run.kv)
    prepare_arm(run.of_arm, model, config, _texts_of_streams(run, tokenizer))
    model.save_pretrained(folder / "start.partial")
    tokenizer.save_pretrained(folder / "start.partial")
    (folder / "start.partial").rename(start)
    return start


def is_variant(kv: str) -> bool:
    """Whether streams share a cache in a way that the package does not have."""
    return kv not in ("own", "shared")


def _train_variant(run: RecycleRun, start: Path, folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """A trained variant of one cache with its tokenizer, and what there is to report of its training."""
    began = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(start)
    first_text = _texts_of_streams(run, tokenizer)[-1:]  # the others are those of streams 1 to P - 1
    variant = recycled_variants.open_variant(
        run.kv, start, run.streams, first_text, frozen=run.of_arm.trains == STREAMS
    )
    recycled_variants.fit(variant, tokenizer, _training(run.tokens), _settings(run, folder))
    trained = sum(parameter.numel() for parameter in variant.parameters() if parameter.requires_grad)
    seconds = round(time.perf_counter() - began, 1)
    return variant.model, tokenizer, {"trained_parameters": trained, "losses": {}, "seconds": seconds}


def _texts_of_streams(run: RecycleRun, tokenizer: Any) -> torch.Tensor:
    """What P streams start from, `(P, T)`: pieces of a fiftieth of the documents, another one for each seed."""
    texts = _training(run.tokens or UNTRAINED_FROM)[run.seed % 50 :: 50]
    return calibration_ids(texts, tokenizer, run.streams, PREFIX_LENGTH)


def _settings(run: RecycleRun, folder: Path) -> TrainSettings:
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for _, text in _training(run.tokens)))
    trains = run.of_arm.trains
    return TrainSettings(
        data=[str(data)],
        tokens=run.tokens,
        sequence_length=SEQUENCE_LENGTH,
        batch_size=BATCH_SIZE,
        learning_rate=None if trains == STREAMS else run.backbone_rate,
        streams_learning_rate=run.streams_rate if trains in (STREAMS, BOTH) else None,
        aggregator_learning_rate=run.streams_rate if run.aggregator_rate is None else run.aggregator_rate,
        freeze_backbone=trains == STREAMS,
        lora_rank=adapter_rank(run.streams) if trains == ADAPTER else None,
        bf16=PRECISION == "bfloat16",
        keep_checkpoints=1,
        seed=run.seed,
    )


def adapter_rank(streams: int) -> int:
    """The rank at which an adapter of all linear layers has the parameters of P streams."""
    model: Any = AutoModelForCausalLM.from_pretrained(small_model_path())
    before = model.num_parameters()
    added = wrap(model, streams, prefix_length=PREFIX_LENGTH, init="random").num_parameters() - before
    rank = rank_with_parameters(model, added)
    assert rank is not None
    return rank


def _training(tokens: int) -> Sequence[Document]:
    """As many documents as the tokens need, in the order of their names' hashes."""
    texts, size = [], 0
    for document in sorted(read_sides().train):
        if size > tokens * BYTES_PER_TOKEN:
            break
        if not document.name.startswith("stdlib/"):
            texts.append((document.name, document.contents.decode(errors="replace")))
            size += len(document.contents)
    return texts


def _held_out(side: str, count: int) -> Sequence[Document]:
    """Documents that have a middle."""
    documents = sorted(getattr(read_sides(), side))
    wanted = [document for document in documents if not document.name.startswith("stdlib/")]
    long = [document for document in wanted if len(document.contents) >= 2 * SEQUENCE_LENGTH * BYTES_PER_TOKEN]
    return [(document.name, document.contents.decode(errors="replace")) for document in long[:count]]
