"""The result of a training run: the trained checkpoint, its model card, the plot and the report."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from parscale.checkpoints.description import describe
from parscale.checkpoints.models import copy_processor
from parscale.checkpoints.texts.files import first_line
from parscale.checkpoints.training.held_out import Texts, against_untouched
from parscale.checkpoints.training.loss_plot import plot_metrics
from parscale.checkpoints.training.model_card import CARD, TextLosses, TrainingFacts, model_card
from parscale.checkpoints.training.new_model import NewModel
from parscale.checkpoints.training.run_folder import REPORT, Run
from parscale.checkpoints.training.settings import LORA, ONLY_STREAMS
from parscale.checkpoints.training.trainer import BACKBONE, TEXT
from parscale.checkpoints.training.weight_files import put_together
from parscale.config import OWN
from parscale.format.folders import CONFIG, STREAMS_CONFIG, STREAMS_ONLY
from parscale.format.staging import staged

PLOT = "loss.png"


def finish(
    checkpoint: str | NewModel,
    run: Run,
    steps: int,
    tokenizer: PreTrainedTokenizerBase,
    report: dict[str, Any],
    texts: Texts,
    batch_size: int,
) -> None:
    """Puts the trained checkpoint, its tokenizer, its card and the plot into the run's folder, and at last the report.

    The model is there before it is compared with the untouched backbone, and stays where that fails, with a warning.

    Args:
        checkpoint: the checkpoint that the run started from.
        run: its folder, with the checkpoint after the last step.
        steps: how many there were.
        tokenizer: of the model.
        report: what is written to `training.json`, and stated by the card.
        texts: held-out documents to compare on, by the text's name; a new model is compared with nothing.
        batch_size: windows of them in a batch.
    """
    report = report | {"backbone": None if isinstance(checkpoint, NewModel) else _backbone_of(checkpoint)}
    with staged(run.folder, last=(CONFIG, STREAMS_CONFIG)) as work:
        put_together(checkpoint, run.checkpoint(steps), work)
        if not isinstance(checkpoint, NewModel):
            copy_processor(checkpoint, work)
        tokenizer.save_pretrained(work)
        plot_metrics(run.metrics(), work / PLOT)
        _write_card(work, work, report)
    comparisons = _compared(checkpoint, run, tokenizer, report, texts, batch_size)
    report = report | {"comparisons": comparisons}
    with staged(run.folder, last=REPORT) as work:
        _write_card(run.folder, work, report)
        text = json.dumps(report, indent=2, allow_nan=False)
        (work / REPORT).write_text(text + "\n", encoding="utf-8")


def _write_card(trained: Path, folder: Path, report: Mapping[str, Any]) -> None:
    card = card_of(trained, report)
    if card is not None:
        (folder / CARD).write_text(card, encoding="utf-8")


def _compared(
    checkpoint: str | NewModel,
    run: Run,
    tokenizer: PreTrainedTokenizerBase,
    report: Mapping[str, Any],
    texts: Texts,
    batch_size: int,
) -> list[dict[str, Any]]:
    if isinstance(checkpoint, NewModel):  # whose backbone was never trained without the streams
        return []
    try:
        entries = against_untouched(
            str(run.folder),
            checkpoint,
            tokenizer,
            texts,
            window=report["sequence_length"],
            batch_size=batch_size,
            tokens=report["tokens"],
        )
        json.dumps(entries, allow_nan=False)
    except Exception as error:  # of many types, such as too little memory: the model is there
        warnings.warn(
            f"The trained model is in {run.folder}, but was not compared with the untouched backbone "
            f"({first_line(error).rstrip('.')}); to try again, such as with a smaller --micro-batch-size, remove "
            f"{run.folder / REPORT} and give the same command with --resume.",
            stacklevel=5,
        )
        return []
    return entries


def card_of(folder: Path, report: Mapping[str, Any]) -> str | None:
    """The model card of a trained folder by its run's report, or None for a model without streams."""
    what = describe(str(folder))
    if what["num_streams"] == 1:
        return None
    rates = {"streams": report["streams_learning_rate"], "aggregator": report["aggregator_learning_rate"]}
    if report["trains"] != ONLY_STREAMS:
        rates["adapter" if report["trains"] == LORA else "backbone"] = report["learning_rate"]
    backbone = what["backbone"]
    new = report.get("new_model")
    facts = TrainingFacts(
        checkpoint=report["name"],
        backbone_class=str(backbone["class"]),
        backbone=report["backbone"],
        num_streams=what["num_streams"],
        prefix_length=what.get("prefix_length"),
        smoothing=what["smoothing"],
        init=what["init"],
        transform=what["transform"] or "-",
        trains=report["trains"],
        trained_parameters=report["trained_parameters"],
        parameters=report["parameters"],
        tokens=report["tokens"],
        sequence_length=report["sequence_length"],
        batch_size=report["batch_size"],
        learning_rates=rates,
        schedule=(
            f"it rises over {report['warmup']:.0%} of the steps, is constant, and falls to zero over the last "
            f"{report['decay']:.0%}"
        ),
        data=tuple(report["data"]),
        datasets=tuple(report["datasets"]),
        command=report["command"] or "parscale.checkpoints.train(...)",
        losses={
            name: TextLosses(None if new else found.get("backbone"), found.get("before"), found.get("after"))
            for name, found in report["losses"].items()
        },
        versions=report["versions"],
        streams_only=what["kind"] == STREAMS_ONLY,
        kv=what.get("kv", OWN),
        new=None if new is None else f"{'Qwen2, ' if 'configuration' in new else ''}{new['config']}",
        comparisons=tuple(report.get("comparisons", ())),
        controls=report.get("controls", {}),
    )
    return model_card(facts)


def _backbone_of(checkpoint: str) -> str | None:
    """What a checkpoint calls its backbone, which may be in the checkpoint itself; None if unknown."""
    what = describe(checkpoint)
    name: str | None = what["backbone"].get("name" if what["kind"] == STREAMS_ONLY else "made_from")
    return name


def losses_by_text(metrics: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The losses of each text in nats per token, from a run's metrics: backbone, before the first step, at the end."""
    losses: dict[str, dict[str, float]] = {}
    for line in metrics:
        if "text" not in line:
            continue
        found = losses.setdefault(line["text"], {})
        if f"{BACKBONE}_loss" in line:
            found["backbone"] = line[f"{BACKBONE}_loss"]
        else:
            found.setdefault("before", line[f"{TEXT}_loss"])
            found["after"] = line[f"{TEXT}_loss"]
    return losses
