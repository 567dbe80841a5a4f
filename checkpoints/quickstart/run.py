"""The quickstart: adds streams to a small model, post-trains it on real text, and compares it with controls.

Nothing is downloaded. The text is the source of packages that are installed with this one, with 5 % of the files held
out; the small model has seen other source only.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from parscale import ParScaleConfig
from parscale.checkpoints.conversion.convert import calibration_ids
from parscale.checkpoints.evaluation.controls import (
    ADAPTER,
    ARMS,
    HELD_AGAINST,
    NOTHING,
    STREAMS,
    Arm,
    prepare_arm,
)
from parscale.checkpoints.evaluation.paired_differences import single_seed_entries
from parscale.checkpoints.evaluation.places import evaluate_places
from parscale.checkpoints.evaluation.text_loss import Evaluation
from parscale.checkpoints.models import load_any
from parscale.checkpoints.quickstart.report import plot, print_report
from parscale.checkpoints.small_model import small_model_path
from parscale.checkpoints.texts.documents import Document, Source
from parscale.checkpoints.texts.python_source import package_source_split
from parscale.checkpoints.texts.token_ids import vocabulary_of
from parscale.checkpoints.training.model_loading import rank_with_parameters
from parscale.checkpoints.training.packing import pack_documents
from parscale.checkpoints.training.run_folder import Run
from parscale.checkpoints.training.settings import TrainSettings
from parscale.checkpoints.training.speed import faster_in_bf16, seconds_of_step
from parscale.checkpoints.training.train import train
from parscale.checkpoints.versions import versions
from parscale.format.pretrained import read_pretrained
from parscale.format.staging import require_new_folder, staged
from parscale.terminal.console import Terminal

PROMPT = "def read_config(path):\n"
CODE = "held-out code"
"""The quickstart's name for its held-out code."""
PACKAGES = ("numpy", "scipy", "matplotlib")  # what this package needs itself, so that they are there
UNTOUCHED_ARM, FROZEN_ARM, TRAINED_ARM = "untouched", "frozen", "streams-and-backbone"
SAVED = (FROZEN_ARM, TRAINED_ARM)  # the two with trained streams
WRITERS = (UNTOUCHED_ARM, *SAVED)  # the models that continue `PROMPT`


@dataclass(frozen=True)
class QuickstartSettings:
    """The quickstart's sizes; with the defaults it takes five minutes or less on two CPU cores.

    Attributes:
        num_streams: P.
        prefix_length: T.
        tokens: training tokens of each row.
        characters_per_token: characters of training text to choose from, for each of `tokens`; the small model's tokens
            are about 3 characters.
        seconds: approximate limit for the training of the slowest row. On a machine that is too slow for `tokens`, all
            rows train on fewer tokens.
        sequence_length: tokens in a training block.
        batch_size: blocks in a step.
        window: tokens in a window of the evaluation; the small model was pretrained at this length.
        streams_learning_rate: of prefixes: the best power of two times 0.01 for streams on a frozen backbone and so
            many tokens, measured on the source of other packages. The aggregator has the default of `parscale train`.
        backbone_learning_rate: of all other parameters. This rate and the next are the best that the study of controls
            found for the small model and 250 thousand tokens of such text.
        adapter_learning_rate: of the adapter.
        middles: maximum number of windows from the middle of each document.
        new_tokens: number of tokens that a model generates.
    """

    num_streams: int = 4
    prefix_length: int = 48
    tokens: int = 65_000
    characters_per_token: int = 16
    seconds: float = 50.0
    sequence_length: int = 256
    batch_size: int = 4
    window: int = 512
    streams_learning_rate: float = 0.08
    backbone_learning_rate: float = 4e-4
    adapter_learning_rate: float = 2e-3
    middles: int = 3
    new_tokens: int = 80


@dataclass(frozen=True)
class QuickstartTexts:
    """The texts of the quickstart.

    Attributes:
        train: documents to train on.
        measured: documents to evaluate on, by kind.
    """

    train: Sequence[Document]
    measured: Mapping[str, Sequence[Document]]


@dataclass(frozen=True)
class Row:
    """One row of the results: one model.

    Attributes:
        losses: by kind of text, and by place, `"beginning"` or `"middle"`.
        written: the text that it generated; None if it was not asked to.
        training: the report of its training; None if it was not trained.
        training_losses: the loss of each step.
    """

    losses: Mapping[str, Mapping[str, Evaluation]]
    written: str | None
    training: Mapping[str, Any] | None = None
    training_losses: Sequence[float] = ()


def run_quickstart(
    output: Path,
    *,
    seed: int = 0,
    settings: QuickstartSettings | None = None,
    model_path: Path | None = None,
    texts: QuickstartTexts | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Adds streams to the small model, post-trains it with its backbone frozen and trained, and compares with controls.

    The controls are the untouched backbone, the backbone trained alone, one trained prefix of T and of P * T tokens
    with its backbone frozen and not, a low-rank adapter of as many parameters as the streams (where the package peft is
    installed), and streams that are not trained: after the same tokens, with the same context in front, at the
    beginnings and in the middles of files that no model was trained on.

    Args:
        output: the folder to write, new or empty; it appears only when it is complete. It gets the two post-trained
            models in `frozen` and `streams-and-backbone`, for `parscale.load`, and `report.json` and `report.png`.
        seed: of random choices and of the order of the text.
        settings: the sizes.
        model_path: a model to use in place of the one in the package.
        texts: documents to use in place of the installed packages' files.
        console: where progress and the table are shown; by default standard output.

    Returns:
        The report, which can be written as JSON: losses and generated text of each model, under `"comparisons"` the
        paired differences of `single_seed_entries`, the settings and versions, and the total seconds.

    Raises:
        ValueError: `output` is not empty, or there is too little text.
    """
    start = time.perf_counter()
    settings, console = settings or QuickstartSettings(), console or Terminal()
    require_new_folder(output)
    with staged(output, last="report.json", new=True) as folder:
        source = str(model_path or small_model_path())
        tokenizer = read_pretrained(AutoTokenizer, source)
        backbone: Any = read_pretrained(AutoModelForCausalLM, source, dtype=torch.float32)
        if torch.cuda.is_available():
            backbone.to("cuda")
        texts = texts or quickstart_texts()
        enough = settings.tokens * settings.characters_per_token
        texts = QuickstartTexts(random_documents(texts.train, enough, seed), texts.measured)
        console.print(
            f"A {type(backbone).__name__} of {backbone.num_parameters():,} parameters gets P = {settings.num_streams} "
            f"streams. It is trained on {len(texts.train)} files and evaluated on {len(texts.measured[CODE])} others."
        )
        bf16 = faster_in_bf16(backbone.device)
        rows = _rows(backbone, tokenizer, texts, settings, seed, bf16, folder, console)
        report = {
            "models": {name: _figures(name, row) for name, row in rows.items()},
            "comparisons": _comparisons(rows, list(texts.measured)),
            "settings": asdict(settings) | {"seed": seed, "training_dtype": "bfloat16" if bf16 else "float32"},
            "prompt": PROMPT,
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "output": str(output),
        }
        plot(report, {name: row.training_losses for name, row in rows.items() if row.training}, folder / "report.png")
        report["seconds"] = round(time.perf_counter() - start, 1)
        (folder / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print_report(report, console)
    return report


def quickstart_texts() -> QuickstartTexts:
    """The source of the packages numpy, scipy and matplotlib: to train on, and held-out files as `CODE`."""
    train, held_out = package_source_split(PACKAGES)
    return QuickstartTexts(train, {CODE: held_out})


def random_documents(documents: Sequence[Document], characters: int, seed: int) -> list[Document]:
    """A random part of documents, in their order, with at least as many characters; all of them if there are fewer.

    A short training reads few tokens of a long text, and to turn all of it into tokens takes longer than to learn from
    them.

    Args:
        documents: pairs of a name and a text.
        characters: how many to find.
        seed: of the choice.

    Returns:
        The part.
    """
    chosen, found = [], 0
    for index in torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist():
        if found >= characters:
            break
        chosen.append(index)
        found += len(documents[index][1])
    return [documents[index] for index in sorted(chosen)]


def write(model: Any, tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> str:
    """The model's continuation of `PROMPT`, with the most likely token at each step."""
    model.eval()
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def _rows(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: QuickstartTexts,
    settings: QuickstartSettings,
    seed: int,
    bf16: bool,
    folder: Path,
    console: Console,
) -> dict[str, Row]:
    """Trains and evaluates all arms, and saves the two with trained streams."""

    def row(
        name: str, model: Any, training: Mapping[str, Any] | None = None, training_losses: Sequence[float] = ()
    ) -> Row:
        losses = {
            kind: evaluate_places(
                model, tokenizer, documents, sequence_length=settings.window, middles=settings.middles
            )
            for kind, documents in texts.measured.items()
        }
        written = write(model, tokenizer, settings.new_tokens) if name in WRITERS else None
        return Row(losses, written, training, training_losses)

    P, T = settings.num_streams, settings.prefix_length
    calibration = calibration_ids(texts.train, tokenizer, P, T, vocabulary=vocabulary_of(backbone))
    config = ParScaleConfig(P, T, seed=seed)
    arms = _arms(console)
    starts = {arm.name: prepare_arm(arm, copy.deepcopy(backbone), config, calibration) for arm in arms}
    tokens = _affordable_tokens(starts[TRAINED_ARM], tokenizer, texts, settings, bf16)
    rank = rank_with_parameters(backbone, sum(p.numel() for p in starts[FROZEN_ARM].parameters() if p.requires_grad))
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for arm in arms:
            name, start = arm.name, work / f"{arm.name}-start"
            if arm.trains == NOTHING:
                rows[name] = row(name, starts[name])
                continue
            starts[name].save_pretrained(start)
            tokenizer.save_pretrained(start)
            console.print(f"training: {arm.title}", highlight=False)
            wanted = _train_settings(arm, rank, texts, settings, tokens, bf16, seed)
            training = train(str(start), work / name, wanted, console=console)
            console.print(f"{training['tokens']:,} tokens in {_seconds(training):.0f} seconds", highlight=False)
            model = load_any(str(work / name)).to(backbone.device)
            losses = [line["loss"] for line in Run(work / name).metrics() if "loss" in line]
            rows[name] = row(name, model, training, losses)
            if name in SAVED:
                model.save_pretrained(folder / name)
                tokenizer.save_pretrained(folder / name)
    return rows


def _arms(console: Console) -> list[Arm]:
    """All arms, without the adapter where its package is missing."""
    if importlib.util.find_spec("peft") is not None:
        return list(ARMS)
    left_out = next(arm for arm in ARMS if arm.trains == ADAPTER)
    needs = f"left out: {left_out.title}, which needs the package peft: pip install 'parscale[peft]'"
    console.print(needs, highlight=False, markup=False)
    return [arm for arm in ARMS if arm is not left_out]


def _comparisons(rows: Mapping[str, Row], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Compares each arm with its controls, by text and place."""
    entries = []
    for name, row in rows.items():
        for baseline in HELD_AGAINST.get(name, ()):
            for text in texts if baseline in rows else ():
                measured = {arm: rows[arm].losses[text] for arm in (name, baseline)}
                tokens = row.training["tokens"] if row.training else 0
                entries += single_seed_entries(name, baseline, text, measured, tokens)
    return entries


def _affordable_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: QuickstartTexts,
    settings: QuickstartSettings,
    bf16: bool,
) -> int:
    """The number of training tokens of each row, from the time of a step in the slowest row; at least one step's."""
    per_step = settings.batch_size * settings.sequence_length
    if settings.tokens <= per_step:
        return settings.tokens
    documents = texts.train[: settings.batch_size]
    blocks = pack_documents(documents, tokenizer, settings.sequence_length, vocabulary=vocabulary_of(model))
    if not len(blocks):  # training will report that there is too little text
        return settings.tokens
    steps = int(settings.seconds / seconds_of_step(model, blocks, settings.batch_size, bf16=bf16))
    return min(settings.tokens, max(1, steps) * per_step)


def _train_settings(
    arm: Arm, rank: int | None, texts: QuickstartTexts, settings: QuickstartSettings, tokens: int, bf16: bool, seed: int
) -> TrainSettings:
    """How an arm trains; `rank` is that of the adapter."""
    is_adapter = arm.trains == ADAPTER
    return TrainSettings(
        data=[Source.of("the training files", texts.train)],
        tokens=tokens,
        sequence_length=settings.sequence_length,
        batch_size=settings.batch_size,
        streams_learning_rate=settings.streams_learning_rate,
        learning_rate=settings.adapter_learning_rate if is_adapter else settings.backbone_learning_rate,
        warmup=0.05,  # a short run does not stay at its peak
        decay=0.95,
        freeze_backbone=arm.trains == STREAMS,
        lora_rank=rank if is_adapter else None,
        bf16=bf16,
        save_every=tokens,  # only at the end
        seed=seed,
    )


def _seconds(training: Mapping[str, Any]) -> float:
    """The seconds of the steps alone."""
    return float(training["tokens"] / training["tokens_per_second"])


def _figures(name: str, row: Row) -> dict[str, Any]:
    return {
        "title": next(arm.title for arm in ARMS if arm.name == name),
        "trained_parameters": row.training["trained_parameters"] if row.training else 0,
        "trained_tokens": row.training["tokens"] if row.training else 0,
        "training_seconds": round(_seconds(row.training), 1) if row.training else 0.0,
        "loss": {
            kind: {where: fmean(document.loss for document in found.documents) for where, found in places.items()}
            for kind, places in row.losses.items()
        },
        "measured_tokens": {
            kind: {where: found.tokens for where, found in places.items()} for kind, places in row.losses.items()
        },
        "written": row.written,
    }
