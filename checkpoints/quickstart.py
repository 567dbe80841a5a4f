"""The main job on what is at hand: a small trained model is converted, post-trained on real text, compared, tried.

Nothing is downloaded. The text is the source of the running Python's standard library, of which 5 % of the files are
held out; pydoc's copy of the language reference is text of another kind, which no model here was trained on.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from parscale import ParScaleConfig, wrap
from parscale.checkpoints.compare import compare
from parscale.checkpoints.convert import calibration_ids
from parscale.checkpoints.evaluate import Evaluation, evaluate
from parscale.checkpoints.finishing import versions
from parscale.checkpoints.posttrain import Recipe, TrainingRun, faster_in_bf16, post_train
from parscale.checkpoints.report import plot, print_report
from parscale.checkpoints.small_model import small_model_path
from parscale.checkpoints.text import Document, pack, split
from parscale.checkpoints.tokens import vocabulary_of
from parscale.format.pretrained import read_pretrained
from parscale.format.staging import require_new_folder, staged
from parscale.terminal.console import Terminal

PROMPT = "def read_config(path):\n"
CODE, PROSE = "held-out code", "prose"
UNTOUCHED, FROZEN, EVERYTHING, ALONE = "untouched", "frozen", "everything", "alone"
TITLES = {
    UNTOUCHED: "untouched backbone",
    FROZEN: "streams, backbone frozen",
    EVERYTHING: "streams and backbone",
    ALONE: "backbone alone, trained",
}
# What is held against what: each row against the untouched backbone, and streams against mere further training.
PAIRS = ((FROZEN, UNTOUCHED), (EVERYTHING, UNTOUCHED), (ALONE, UNTOUCHED), (EVERYTHING, ALONE))


@dataclass(frozen=True)
class Settings:
    """The quickstart's sizes; as they are, it takes about five minutes on two CPU cores.

    Attributes:
        num_streams: P.
        prefix_length: T.
        tokens: how many each row trains on.
        seconds: how long each row may train. A machine that is too slow for `tokens` sees fewer.
        sequence_length: tokens in a training block.
        window: tokens in a window of the evaluation; the small model was pretrained at this length.
        streams_learning_rate: of prefixes and aggregator.
        backbone_learning_rate: of everything else.
        code_characters: from each held-out file's beginning, how many are measured.
        prose_characters: the same of each topic.
        new_tokens: how many each model writes.
    """

    num_streams: int = 4
    prefix_length: int = 48
    tokens: int = 250_000
    seconds: float = 120.0
    sequence_length: int = 256
    window: int = 512
    streams_learning_rate: float = 3e-2
    backbone_learning_rate: float = 3e-5
    code_characters: int = 3500
    prose_characters: int = 1000
    new_tokens: int = 80


@dataclass(frozen=True)
class Texts:
    """Documents to train on, and those to measure on by their kind."""

    train: Sequence[Document]
    measured: Mapping[str, Sequence[Document]]


@dataclass(frozen=True)
class Row:
    """One model: its losses by kind of text, what it wrote, how many parameters it trained, and how that went."""

    losses: Mapping[str, Evaluation]
    written: str
    trained_parameters: int = 0
    training: TrainingRun | None = None


def run(
    output: Path,
    *,
    seed: int = 0,
    settings: Settings | None = None,
    model_path: Path | None = None,
    texts: Texts | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Convert the small model, post-train it in two ways, compare both with the backbone, and write code.

    Args:
        output: the folder to write, new or empty; it appears only when it is whole. It gets the two post-trained models
            in `frozen` and `everything`, for `parscale.load`, and `report.json` and `report.png`.
        seed: of the draws and of the order of the text.
        settings: the sizes.
        model_path: another model than the one that the package carries.
        texts: other documents than the standard library's.
        console: where progress and the table are shown; by default on standard output.

    Returns:
        The report, which can be written as JSON: what each model measured and wrote, the paired differences, the
        settings and versions, and the seconds it all took.

    Raises:
        ValueError: `output` holds something, or there is too little text.
    """
    start = time.perf_counter()
    settings, console = settings or Settings(), console or Terminal()
    require_new_folder(output)
    with staged(output, last="report.json", new=True) as folder:
        source = str(model_path or small_model_path())
        tokenizer = read_pretrained(AutoTokenizer, source)
        backbone: Any = read_pretrained(AutoModelForCausalLM, source, dtype=torch.float32)
        if torch.cuda.is_available():
            backbone.to("cuda")
        texts = texts or standard_texts(settings.code_characters, settings.prose_characters)
        console.print(
            f"A {type(backbone).__name__} of {backbone.num_parameters():,} parameters gets P = {settings.num_streams} "
            f"streams. It trains on {len(texts.train)} files, and is measured on {len(texts.measured[CODE])} others."
        )
        bf16 = faster_in_bf16(backbone.device)
        rows = _rows(backbone, tokenizer, texts, settings, seed, bf16, folder, console)
        report = {
            "models": {name: _figures(name, row) for name, row in rows.items()},
            "comparisons": [
                {"model": model, "baseline": baseline, "text": kind}
                | asdict(compare(rows[model].losses[kind], rows[baseline].losses[kind]))
                for model, baseline in PAIRS
                for kind in texts.measured
            ],
            "settings": asdict(settings) | {"seed": seed, "training_dtype": "bfloat16" if bf16 else "float32"},
            "prompt": PROMPT,
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "output": str(output),
        }
        plot(report, {name: row.training.losses for name, row in rows.items() if row.training}, folder / "report.png")
        report["seconds"] = round(time.perf_counter() - start, 1)
        (folder / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print_report(report, console)
    return report


def standard_texts(code_characters: int = 3500, prose_characters: int = 1000) -> Texts:
    """The standard library's files and pydoc's topics; of the measured ones only so many characters each."""
    from pydoc_data.topics import topics

    train, held_out = split()
    return Texts(
        train,
        {
            CODE: [(name, text[:code_characters]) for name, text in held_out],
            PROSE: [(name, text[:prose_characters]) for name, text in sorted(topics.items())],
        },
    )


def write(model: Any, tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> str:
    """What a model makes of `PROMPT`, always taking the likeliest token."""
    model.eval()
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def _rows(
    backbone: Any,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    settings: Settings,
    seed: int,
    bf16: bool,
    folder: Path,
    console: Console,
) -> dict[str, Row]:
    """Train and measure the four models, and save the two with streams."""
    vocabulary = vocabulary_of(backbone)
    blocks = pack(texts.train, tokenizer, settings.sequence_length, vocabulary=vocabulary)
    calibration = calibration_ids(
        texts.train, tokenizer, settings.num_streams, settings.prefix_length, vocabulary=vocabulary
    )
    config = ParScaleConfig(settings.num_streams, settings.prefix_length, seed=seed)

    def measure(model: Any) -> dict[str, Evaluation]:
        return {
            kind: evaluate(model, tokenizer, documents, sequence_length=settings.window)
            for kind, documents in texts.measured.items()
        }

    rows = {UNTOUCHED: Row(measure(backbone), write(backbone, tokenizer, settings.new_tokens))}
    seen = settings.tokens
    for name in (FROZEN, EVERYTHING, ALONE):
        model = copy.deepcopy(backbone)
        if name != ALONE:
            wrap(model, config, calibration=calibration)
        if name == FROZEN:
            model.freeze_backbone()
        recipe = Recipe(
            tokens=seen if name == ALONE else settings.tokens,  # as many as the row before
            streams_learning_rate=settings.streams_learning_rate,
            backbone_learning_rate=settings.backbone_learning_rate,
            seconds=settings.seconds,
            seed=seed,
        )
        with _progress(f"training: {TITLES[name]}", console) as on_step:
            training = post_train(model, blocks, recipe, bf16=bf16, on_step=on_step)
        console.print(f"{TITLES[name]}: {training.tokens:,} tokens in {training.seconds:.0f} seconds", highlight=False)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        rows[name] = Row(measure(model), write(model, tokenizer, settings.new_tokens), trained, training)
        seen = training.tokens
        if name != ALONE:
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    return rows


def _figures(name: str, row: Row) -> dict[str, Any]:
    return {
        "title": TITLES[name],
        "trained_parameters": row.trained_parameters,
        "trained_tokens": row.training.tokens if row.training else 0,
        "training_seconds": round(row.training.seconds, 1) if row.training else 0.0,
        "loss": {
            kind: fmean(document.loss for document in evaluation.documents) for kind, evaluation in row.losses.items()
        },
        "measured_tokens": {kind: evaluation.tokens for kind, evaluation in row.losses.items()},
        "written": row.written,
    }


@contextmanager
def _progress(title: str, console: Console) -> Iterator[Any]:
    """A bar on a terminal while something runs; yields what takes the share that is done."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=1.0)
        yield lambda share: progress.update(task, completed=share)
