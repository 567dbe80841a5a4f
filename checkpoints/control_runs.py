"""What a gain of streams has to beat, trained beside a run: the same tokens in the same order, then compared.

A run's folder gets `controls/NAME`, each the folder of a run of its own, and `controls.json` once all of them have
ended. Whatever stops them, the next call goes on from their last checkpoints.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from parscale import ParScaleConfig, unwrap
from parscale.checkpoints.conversion.convert import calibration_ids
from parscale.checkpoints.description import describe
from parscale.checkpoints.evaluation.controls import BACKBONE, BOTH, STREAMS, Arm, prepare_arm
from parscale.checkpoints.evaluation.paired_differences import (
    Places,
    format_interval,
    middle_sentences,
    single_seed_entries,
    verdict,
)
from parscale.checkpoints.evaluation.text_loss import DEFAULT_SEQUENCE_LENGTH, positions_of
from parscale.checkpoints.models import find_tokenizer, load_any, require_tokenizer, text_config
from parscale.checkpoints.texts.chat_tokens import as_text
from parscale.checkpoints.texts.documents import Document, Source, text_documents
from parscale.checkpoints.texts.sources import open_sources
from parscale.checkpoints.texts.token_ids import vocabulary_of
from parscale.checkpoints.training.digests import checkpoint_digest
from parscale.checkpoints.training.held_out import (
    NOT_TRAINED,
    TRAINED,
    UNTOUCHED,
    UNTRAINED,
    Texts,
    measure_places,
    measure_untouched,
    texts_to_measure,
)
from parscale.checkpoints.training.model_card import CARD
from parscale.checkpoints.training.model_loading import rank_with_parameters
from parscale.checkpoints.training.packing import Encoder, documents_of
from parscale.checkpoints.training.run_folder import CONTROLS, Run, read_object
from parscale.checkpoints.training.run_result import card_of
from parscale.checkpoints.training.settings import BACKBONE_RATE, LORA_RATE, ONLY_STREAMS, TrainSettings
from parscale.checkpoints.training.train import train
from parscale.checkpoints.training.training_data import Sources
from parscale.config import LORA, OWN, PROMPT
from parscale.distributed.processes import number_of_processes
from parscale.format.folders import FULL, Checkpoint
from parscale.format.staging import staged_file
from parscale.format.working import working
from parscale.streams.state import find_state
from parscale.terminal.console import Terminal

FOLDER = "controls"
ADAPTER_RANK = 8  # in place of a whole backbone, where that is quantized
SAME = ("data_digest", "tokens", "steps", "sequence_length", "batch_size", "seed", "warmup", "decay", "bf16")
"""What of a run a control shares, so that it reads the same tokens in the same order at the same pace."""


@dataclass(frozen=True)
class Control:
    """One way to spend the tokens of a run without P streams.

    Attributes:
        name: of its folder.
        title: how the table shows it.
        arm: what it adds to the backbone.
        lora_rank: of an adapter that trains in it.
        learning_rate: of all parameters but the streams'; None for the default.
    """

    name: str
    title: str
    arm: Arm
    lora_rank: int | None = None
    learning_rate: float | None = None


def controls_of(
    streams: ParScaleConfig, run: Mapping[str, Any], *, largest_rank: int | None = None, equal_rank: int | None = None
) -> list[Control]:
    """What the streams of a run have to beat.

    Args:
        streams: that were trained.
        run: its report.
        largest_rank: that an adapter can have, by the layers in which streams differ by low-rank matrices; one of this
            rank is whatever one of a higher rank could be.
        equal_rank: at which an adapter has as many parameters as streams with prefixes or prompts.

    Returns:
        The backbone trained alone and, where streams differ by prefixes or prompts, one of T and one of P * T tokens;
        on a frozen backbone also an adapter of as many parameters, at a rate that stands to the backbone's as their
        defaults do. Where they differ by low-rank matrices and the backbone itself does not train, one adapter of their
        rank and one of P times that (each added to the rank of an adapter that trains beside the streams, and at most
        the largest rank), at their learning rate; one alone if these are equal.
    """
    frozen = run["trains"] == ONLY_STREAMS
    of_alone, of_adapter = _rates(run)
    alone_rank = ADAPTER_RANK if frozen and run["quantize"] else run["lora_rank"]
    how = f" (adapter of rank {alone_rank})" if alone_rank else ""
    controls = [Control("alone", f"backbone alone{how}", Arm("alone", BACKBONE), alone_rank, of_alone)]
    if streams.transform == LORA:
        of_run = run["lora_rank"] or 0
        for name, factor in (("adapter", 1), ("wide-adapter", streams.num_streams)) if frozen or of_run else ():
            rank = of_run + factor * streams.rank
            rank = min(rank, largest_rank or rank)
            if rank != controls[-1].lora_rank or name == "adapter":
                arm = Arm(name, BACKBONE)
                controls.append(Control(name, f"one adapter of rank {rank}", arm, rank, run["streams_learning_rate"]))
        return controls
    beside = "" if frozen else " and backbone"
    for name, long in (("prefix", False), ("long-prefix", True)):
        length = streams.prefix_length * (streams.num_streams if long else 1)
        arm = Arm(name, STREAMS if frozen else BOTH, prefix=True, long=long)
        title = f"one {streams.transform} of {length} tokens{beside}"
        controls.append(Control(name, title, arm, run["lora_rank"], run["learning_rate"]))
    if frozen and equal_rank is not None and equal_rank != alone_rank:
        title = f"one adapter of rank {equal_rank}, as many parameters"
        controls.append(Control("adapter", title, Arm("adapter", BACKBONE), equal_rank, of_adapter))
    return controls


def _rates(run: Mapping[str, Any]) -> tuple[float, float]:
    """The learning rates of the backbone alone, or what trains in its place, and of an adapter of equal size."""
    rate: float = run["learning_rate"]
    if run["trains"] != ONLY_STREAMS:
        return rate, rate
    is_given = rate not in (run["streams_learning_rate"], BACKBONE_RATE)  # and not for the streams
    if run["quantize"]:
        return (rate, rate) if is_given else (LORA_RATE, LORA_RATE)
    of_backbone = rate if is_given else BACKBONE_RATE
    return of_backbone, of_backbone * LORA_RATE / BACKBONE_RATE


def check_controls(checkpoint: str, settings: TrainSettings, run: Mapping[str, Any] | None = None) -> None:
    """Refuses controls that cannot be trained or compared, before any work.

    Args:
        checkpoint: what the run starts from.
        settings: of the run.
        run: its report, if it has ended: then its sequences count.

    Raises:
        ValueError: there is no held-out text, the checkpoint has no streams or was trained before, its backbone has
            dropout or too few positions for the longest prompt, PEFT is missing, or several processes take part.
    """
    if not settings.eval_data:
        raise ValueError("Controls are compared on held-out text; give some by --eval-data.")
    sources = open_sources([*settings.eval_data.values()], text_column=settings.text_column)
    if not any(True for source in sources for _ in text_documents(source)):
        raise ValueError("Controls are compared on held-out text, and --eval-data holds chats alone; add some text.")
    what = describe(checkpoint)
    if what["num_streams"] == 1:
        raise ValueError(f"{checkpoint} has no streams, which controls are for; leave --controls out.")
    if Run(Path(checkpoint)).report() is not None:
        raise ValueError(
            f"The streams of {checkpoint} were trained before, and controls would begin without that training; give "
            "--controls to a run that starts from streams as parscale convert makes them."
        )
    adapted = what["transform"] == LORA or settings.quantize
    if adapted and settings.trains == ONLY_STREAMS and importlib.util.find_spec("peft") is None:
        of_what = "a quantized backbone" if settings.quantize else "low-rank streams"
        raise ValueError(f"Controls of {of_what} are adapters, which need: pip install 'parscale[peft]'.")
    backbone = text_config(checkpoint)
    if what["transform"] == PROMPT:
        length = settings.sequence_length if run is None else run["sequence_length"]
        _check_long_prompt(backbone, what["num_streams"], what["prefix_length"], length)
    if dropout := _dropout(backbone):
        raise ValueError(
            f"The backbone of {checkpoint} trains with dropout ({', '.join(dropout)}), under which one prefix, trained "
            "as two streams that stay equal, would become two: set it to 0 in config.json, for all arms alike."
        )
    if number_of_processes() > 1:
        raise ValueError(
            "Controls train in one process. Train without --controls first, then give the same command with --resume "
            "--controls and without torchrun."
        )


def _check_long_prompt(backbone: Any, P: int, T: int, sequence_length: int | None) -> None:
    """Refuses a prompt of P * T tokens that takes more positions than the run's sequences leave."""
    positions = positions_of(backbone)
    length = min(DEFAULT_SEQUENCE_LENGTH, positions - T) if sequence_length is None else sequence_length
    left = positions - P * T
    if length > left:
        remedy = f"give --sequence-length {left} or less" if left >= 2 else "use shorter prompts"
        raise ValueError(
            f"Controls train one prompt of {P} * {T} tokens, which with sequences of {length} takes more than the "
            f"{positions} positions of the model; {remedy}, or leave --controls out."
        )


def _dropout(backbone: Any) -> list[str]:
    """The dropouts of a backbone, by the names and values in its configuration; those of other heads do not count."""
    return [
        f"{name} = {value}"
        for name, value in sorted(backbone.to_dict().items())
        if "drop" in name and not name.startswith(("classifier", "summary")) and isinstance(value, float) and value > 0
    ]


def train_with_controls(checkpoint: str, output: Path, settings: TrainSettings, **options: Any) -> dict[str, Any]:
    """`train` and then `train_controls`; that the controls can be trained is checked once, before any work.

    Args:
        checkpoint: with streams: a folder, or a name on the Hugging Face Hub.
        output: the folder of the run.
        settings: of the run.
        **options: the other arguments of `train`.

    Returns:
        The reports of both, as one.

    Raises:
        ValueError: as `train` and `check_controls`.
        OSError: as `train` and `train_controls`.
        Interrupted: a signal ended the run or a control, after a checkpoint.
    """
    output = Path(output)
    check_controls(checkpoint, settings, Run(output).report())
    report = train(checkpoint, output, settings, **options)
    return report | _train_controls(checkpoint, output, settings, options.get("console"), data_is_known=True)


def train_controls(
    checkpoint: str, output: Path, settings: TrainSettings, *, console: Console | None = None
) -> dict[str, Any]:
    """Trains the controls of a finished run on the same tokens in the same order, and compares it with each.

    Args:
        checkpoint: what the run was started from.
        output: the run's folder.
        settings: of the run. Its numbers are read from its report; the data has to be the same.
        console: where progress is shown; by default standard error.

    Returns:
        The report, as in `controls.json`: `"controls"` (titles by name), `"comparisons"` and `"sentences"`.

    Raises:
        ValueError: as `check_controls`; the run has not ended, or the data is not what it was trained on.
        OSError: something cannot be read or written; what is whole stays.
        Interrupted: a signal ended a control, after a checkpoint.
    """
    output = Path(output)
    check_controls(checkpoint, settings, Run(output).report())
    return _train_controls(checkpoint, output, settings, console, data_is_known=False)


def _train_controls(
    checkpoint: str, output: Path, settings: TrainSettings, console: Console | None, *, data_is_known: bool
) -> dict[str, Any]:
    """The controls; where `train` has just read the data, it is known to be the run's."""
    run = Run(output).report()
    if run is None:
        raise ValueError(f"{output} holds no finished run, which controls are trained beside; train it first.")
    if run["checkpoint_digest"] not in (None, checkpoint_digest(checkpoint)):
        raise ValueError(
            f"{checkpoint} is not, or no longer, what the run in {output} was trained from, so that its controls would "
            "begin elsewhere; name the checkpoint that the run began with."
        )
    console = console or Terminal(stderr=True)
    tokenizer = require_tokenizer(find_tokenizer(checkpoint), checkpoint)
    texts = _texts(settings, tokenizer, run)
    before = None
    if (output / CONTROLS).is_file():
        before = read_object(output / CONTROLS, "remove it, and --resume --controls compares again")
        if before.get("texts_digest") == _digest(texts):
            _rewrite_card(output, run, before)  # which may be that of the run alone again
            return before
    streams = _streams_of(checkpoint)
    equal_rank = None
    if streams.transform != LORA and run["trains"] == ONLY_STREAMS:
        equal_rank = _equal_rank(checkpoint, run, console)
    controls = controls_of(streams, run, largest_rank=_largest_rank(checkpoint), equal_rank=equal_rank)
    if not data_is_known and any(Run(output / FOLDER / control.name).report() is None for control in controls):
        _check_data(_settings_of(controls[0], settings, run), tokenizer, run, output)
    (output / FOLDER).mkdir(exist_ok=True)
    for control in controls:
        console.print(f"control: {control.title}", highlight=False)
        _train_control(control, checkpoint, output, settings, run, streams, tokenizer, console)
    report = _compare(controls, checkpoint, output, run, tokenizer, texts, settings)
    _rewrite_card(output, run, report, before)
    with staged_file(output / CONTROLS) as beside:  # last: until then the card of before is known
        beside.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return report


def _check_data(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, run: Mapping[str, Any], output: Path
) -> None:
    """Refuses other data than the run's, before a control is trained on it."""
    if Sources(settings).packed(Encoder(tokenizer), run["sequence_length"]).digest != run["data_digest"]:
        raise ValueError(
            f"The data is not, or no longer, what the run in {output} was trained on, so that its controls would read "
            "other tokens; give the data that the run began with."
        )


def _streams_of(checkpoint: str) -> ParScaleConfig:
    what = describe(checkpoint)
    fields = {field.name: what.get(field.name) for field in dataclasses.fields(ParScaleConfig)}
    return ParScaleConfig(**{name: value for name, value in fields.items() if value is not None})


def _largest_rank(checkpoint: str) -> int | None:
    """The largest rank of a layer in which streams differ by low-rank matrices, by the headers of the files."""
    folder = Checkpoint(checkpoint)
    tensors = folder.weights() if folder.kind_with_streams() == FULL else folder.streams()
    sizes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        layer, _, own = name.partition("@")[0].rpartition(".")
        if own == "stream_down":  # (P, r, in)
            sizes.setdefault(layer, []).append(tensor.shape[2])
        elif own == "stream_up":  # (P, out, r)
            sizes.setdefault(layer, []).append(tensor.shape[1])
    return max(map(min, sizes.values()), default=None)


def _equal_rank(checkpoint: str, run: Mapping[str, Any], console: Console) -> int | None:
    """The rank at which an adapter has as many parameters as a run trained; None without PEFT, which trains it."""
    if importlib.util.find_spec("peft") is None:
        console.print("The control with an adapter is left out; it needs: pip install 'parscale[peft]'", markup=False)
        return None
    return rank_with_parameters(load_any(checkpoint), run["trained_parameters"])


def _train_control(
    control: Control,
    checkpoint: str,
    output: Path,
    settings: TrainSettings,
    run: Mapping[str, Any],
    streams: ParScaleConfig,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> None:
    folder = output / FOLDER / control.name
    wanted = _settings_of(control, settings, run)
    report = Run(folder).report()
    if report is None:
        with working(output / FOLDER, f"{control.name}-start") as start:
            _save_start(control, checkpoint, start, settings, streams, tokenizer)
            report = train(str(start), folder, wanted, resume=True, console=console)
    changed = [name for name in SAME if report[name] != run[name]]
    if changed:
        raise ValueError(
            f"The control in {folder} differs from the run in {output} by {', '.join(changed)}: give the data that the "
            f"run was trained on, and remove {folder}."
        )


def _settings_of(control: Control, settings: TrainSettings, run: Mapping[str, Any]) -> TrainSettings:
    """The run's settings with what the control trains in place of the streams."""
    return dataclasses.replace(
        settings,
        eval_data={},
        report_to=(),
        tokens=run["tokens"],
        sequence_length=run["sequence_length"],
        batch_size=run["batch_size"],
        warmup=run["warmup"],
        decay=run["decay"],
        weight_decay=run["weight_decay"],
        bf16=run["bf16"],
        seed=run["seed"],
        freeze_backbone=control.arm.trains == STREAMS,
        lora_rank=None if control.arm.trains == STREAMS else control.lora_rank,
        quantize=run["quantize"],
        streams_learning_rate=run["streams_learning_rate"] if control.arm.prefix else None,
        aggregator_learning_rate=None,
        learning_rate=control.learning_rate,
        keep_checkpoints=1,
    )


def _save_start(
    control: Control,
    checkpoint: str,
    folder: Path,
    settings: TrainSettings,
    streams: ParScaleConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The control before training; made anew each time, and the same each time."""
    model = load_any(checkpoint)
    if find_state(model) is not None:
        model = unwrap(model)
    calibration = _beginning(settings, tokenizer, streams, vocabulary_of(model)) if control.arm.prefix else None
    config = dataclasses.replace(streams, kv=OWN, seed=streams.seed or 0)  # of what is drawn and does not count
    prepare_arm(control.arm, model, config, calibration)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _beginning(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, streams: ParScaleConfig, vocabulary: int
) -> torch.Tensor:
    """So much of the training text as P prefixes start from, `(P, T)`."""
    P, T = streams.num_streams, streams.prefix_length
    sources = open_sources(
        settings.data, text_column=settings.text_column, streaming=settings.streaming, seed=settings.seed
    )
    documents: list[Document] = []
    rest = documents_of(sources)
    while more := list(islice(rest, 8)):
        documents += [(name, as_text(name, text, tokenizer)) for name, text in more]
        if sum(len(text) for _, text in documents) > 8 * P * T:
            break
    return calibration_ids(documents, tokenizer, P, T, vocabulary=vocabulary)


def _texts(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase, run: Mapping[str, Any]) -> Texts:
    sources: list[Source] = open_sources([*settings.eval_data.values()], text_column=settings.text_column)
    named = dict(zip(settings.eval_data, sources, strict=True))
    return texts_to_measure(named, tokenizer, run["sequence_length"], settings.eval_tokens)


def _digest(texts: Texts) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _compare(
    controls: list[Control],
    checkpoint: str,
    output: Path,
    run: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    settings: TrainSettings,
) -> dict[str, Any]:
    window = run["sequence_length"]
    micro = settings.micro_batch_size or run["batch_size"]
    folders: dict[str, str | Path] = {TRAINED: output, UNTRAINED: checkpoint}
    folders |= {control.name: output / FOLDER / control.name for control in controls}
    measured: dict[str, dict[str, Places]] = {UNTOUCHED: measure_untouched(checkpoint, tokenizer, texts, window, micro)}
    for name, folder in folders.items():
        measured[name] = measure_places(load_any(str(folder)), tokenizer, texts, window, micro)
    comparisons = []
    pairs = [(TRAINED, name) for name in (UNTOUCHED, UNTRAINED, *(control.name for control in controls))]
    pairs += [(name, UNTOUCHED) for name in (UNTRAINED, *(control.name for control in controls))]
    for text in texts:
        for arm, baseline in pairs:
            pair = {name: measured[name][text] for name in (arm, baseline)}
            comparisons += single_seed_entries(arm, baseline, text, pair, run["tokens"])
    titles = {control.name: control.title for control in controls}
    return {
        "controls": titles,
        "comparisons": comparisons,
        "sentences": verdicts(comparisons, titles),
        "tokens": run["tokens"],
        "data_digest": run["data_digest"],
        "texts_digest": _digest(texts),
        "versions": run["versions"],
    }


def verdicts(comparisons: list[dict[str, Any]], titles: Mapping[str, str]) -> list[str]:
    """For each text, whether the trained streams are ahead of all their controls in the middle of documents.

    And of the untouched backbone: on text of another kind, every training may do harm, and the least is no gain.
    """
    titles = {UNTOUCHED: NOT_TRAINED[UNTOUCHED], **titles}

    def say(text: str, held: list[Any]) -> str:
        found = "; ".join(f"{titles[entry['baseline']]}: {format_interval(entry)}" for entry in held)
        return f"Streams in the middle of {text}: {verdict(held)}. Difference to {found}."

    return middle_sentences(comparisons, TRAINED, list(titles), say)


def _rewrite_card(
    output: Path, run: Mapping[str, Any], report: Mapping[str, Any], before: Mapping[str, Any] | None = None
) -> None:
    """States the controls in the run's model card, unless somebody has changed that; `before` is what it may state."""
    card = output / CARD
    stated = [{key: each[key] for key in ("comparisons", "controls")} for each in (before, report) if each]
    *known, new = [card_of(output, {**run, **more}) for more in ({}, *stated)]
    if not card.is_file() or card.read_text(encoding="utf-8") not in known:
        return
    with staged_file(card) as beside:
        beside.write_text(new or "", encoding="utf-8")
