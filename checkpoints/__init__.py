"""Checkpoints: conversion, post-training, evaluation, and the quickstart that shows all three.

    from parscale.checkpoints import TrainSettings, convert, evaluate, train

Importing this package imports neither torch nor transformers: each name below is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parscale.checkpoints.control_runs import train_controls
    from parscale.checkpoints.conversion.convert import calibration_ids, convert
    from parscale.checkpoints.description import describe
    from parscale.checkpoints.evaluation.comparison import Comparison, compare
    from parscale.checkpoints.evaluation.controls import (
        ADAPTER,
        ARMS,
        BACKBONE,
        BOTH,
        HELD_AGAINST,
        NOTHING,
        STREAMS,
        Arm,
        Interval,
        crossed_interval,
        hold_against,
        prepare_arm,
    )
    from parscale.checkpoints.evaluation.diagnosis import Diagnosis, diagnose, plot_diagnosis
    from parscale.checkpoints.evaluation.paired_differences import format_interval
    from parscale.checkpoints.evaluation.places import evaluate_places
    from parscale.checkpoints.evaluation.tasks import RECIPES, evaluate_tasks
    from parscale.checkpoints.evaluation.text_loss import DocumentLoss, Evaluation, evaluate
    from parscale.checkpoints.models import open_checkpoint, require_tokenizer
    from parscale.checkpoints.quickstart.report import QUICKSTART_CONTROLS, quickstart_sentences
    from parscale.checkpoints.quickstart.run import (
        CODE,
        QuickstartSettings,
        QuickstartTexts,
        quickstart_texts,
        run_quickstart,
    )
    from parscale.checkpoints.small_model import small_model_path
    from parscale.checkpoints.texts.documents import Chat, Completion, Document, Source
    from parscale.checkpoints.texts.python_source import package_source_split, standard_library_split
    from parscale.checkpoints.texts.sources import open_source, read_documents
    from parscale.checkpoints.training.divergence import DivergedError
    from parscale.checkpoints.training.model_loading import rank_with_parameters
    from parscale.checkpoints.training.new_model import NewModel
    from parscale.checkpoints.training.packing import Blocks, pack, pack_documents
    from parscale.checkpoints.training.settings import TrainSettings
    from parscale.checkpoints.training.speed import faster_in_bf16
    from parscale.checkpoints.training.train import Interrupted, train
    from parscale.checkpoints.training.upload import push

__all__ = [
    "ADAPTER",
    "ARMS",
    "BACKBONE",
    "BOTH",
    "CODE",
    "HELD_AGAINST",
    "NOTHING",
    "QUICKSTART_CONTROLS",
    "RECIPES",
    "STREAMS",
    "Arm",
    "Blocks",
    "Chat",
    "Comparison",
    "Completion",
    "Diagnosis",
    "DivergedError",
    "Document",
    "DocumentLoss",
    "Evaluation",
    "Interrupted",
    "Interval",
    "NewModel",
    "QuickstartSettings",
    "QuickstartTexts",
    "Source",
    "TrainSettings",
    "calibration_ids",
    "compare",
    "convert",
    "crossed_interval",
    "describe",
    "diagnose",
    "evaluate",
    "evaluate_places",
    "evaluate_tasks",
    "faster_in_bf16",
    "format_interval",
    "hold_against",
    "open_checkpoint",
    "open_source",
    "pack",
    "pack_documents",
    "package_source_split",
    "plot_diagnosis",
    "prepare_arm",
    "push",
    "quickstart_sentences",
    "quickstart_texts",
    "rank_with_parameters",
    "read_documents",
    "require_tokenizer",
    "run_quickstart",
    "small_model_path",
    "standard_library_split",
    "train",
    "train_controls",
]

_HOMES = {  # of the public names, below this package
    "control_runs": "train_controls",
    "conversion.convert": "calibration_ids convert",
    "description": "describe",
    "evaluation.comparison": "Comparison compare",
    "evaluation.controls": "ADAPTER ARMS BACKBONE BOTH HELD_AGAINST NOTHING STREAMS Arm Interval crossed_interval "
    "hold_against prepare_arm",
    "evaluation.diagnosis": "Diagnosis diagnose plot_diagnosis",
    "evaluation.paired_differences": "format_interval",
    "evaluation.places": "evaluate_places",
    "evaluation.tasks": "RECIPES evaluate_tasks",
    "evaluation.text_loss": "DocumentLoss Evaluation evaluate",
    "models": "open_checkpoint require_tokenizer",
    "quickstart.report": "QUICKSTART_CONTROLS quickstart_sentences",
    "quickstart.run": "CODE QuickstartSettings QuickstartTexts quickstart_texts run_quickstart",
    "small_model": "small_model_path",
    "texts.documents": "Chat Completion Document Source",
    "texts.python_source": "package_source_split standard_library_split",
    "texts.sources": "open_source read_documents",
    "training.divergence": "DivergedError",
    "training.model_loading": "rank_with_parameters",
    "training.new_model": "NewModel",
    "training.packing": "Blocks pack pack_documents",
    "training.settings": "TrainSettings",
    "training.speed": "faster_in_bf16",
    "training.train": "Interrupted train",
    "training.upload": "push",
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names.split():
            value = getattr(import_module(f"{__name__}.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
