"""The model card of a trained checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from parscale.checkpoints.evaluation.paired_differences import format_interval, in_the_middle, no_middle, verdict
from parscale.checkpoints.texts.files import printable_path
from parscale.checkpoints.training.held_out import NOT_TRAINED, TRAINED, UNTOUCHED
from parscale.checkpoints.training.settings import TrainSettings
from parscale.config import OWN, SHARED, ParScaleConfig
from parscale.descriptions import labels
from parscale.format.folders import hub_name

CARD = "README.md"
TRAINED_PARTS = {
    "streams": "the streams and their aggregator; the backbone was frozen",
    "everything": "streams and backbone",
    "lora": "the streams, and a LoRA adapter, which was merged into the frozen backbone",
}
CITATION = """\
@inproceedings{chen2025parallel,
  title     = {Parallel Scaling Law for Language Models},
  author    = {Chen, Mouxiang and Hui, Binyuan and Cui, Zeyu and Yang, Jiaxi and Liu, Dayiheng and Sun, Jianling and
               Lin, Junyang and Liu, Zhongxin},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2025},
  url       = {https://arxiv.org/abs/2505.10475}
}"""


class TextLosses(NamedTuple):
    """Losses on one held-out text, in nats per predicted token; None if not measured."""

    backbone: float | None
    """The loss of the untouched backbone."""
    before: float | None
    """The loss of the checkpoint before training."""
    after: float | None
    """The loss of the checkpoint after training."""


@dataclass(frozen=True)
class TrainingFacts:
    """The facts that a model card states about a trained checkpoint.

    Attributes:
        checkpoint: the name of the trained checkpoint: its folder's name, or its repository on the Hub.
        backbone_class: such as `"Qwen2ForCausalLM"`.
        backbone: the backbone's name on the Hub, or its path; None if unknown.
        num_streams: as in `parscale.ParScaleConfig`.
        prefix_length: likewise; None for streams without prefixes.
        smoothing: likewise.
        init: likewise; None if unknown.
        transform: likewise.
        trains: `"streams"`, `"everything"` or `"lora"`.
        trained_parameters: number of trained parameters.
        parameters: number of all parameters, of streams and backbone.
        tokens: as in `TrainSettings`.
        sequence_length: likewise.
        batch_size: likewise.
        learning_rates: peak learning rates, by what they apply to, such as `{"streams": 3e-2, "backbone": 3e-5}`.
        schedule: of the learning rates, in words.
        data: the training data, as the user named it.
        command: the command line.
        losses: by name of the held-out text.
        versions: of the software, by name.
        datasets: the entries of `data` that are datasets on the Hub.
        streams_only: whether the checkpoint holds only the streams and takes its backbone from elsewhere.
        kv: whose keys and values a stream reads, `"own"` or `"shared"`.
        new: the configuration of a model that began with random weights; None for one that was trained before.
        comparisons: by place in the held-out documents, as
            `parscale.checkpoints.evaluation.paired_differences.single_seed_entries`.
        controls: titles by name of the controls that the model was held against in `comparisons`.

    Raises:
        ValueError: `trains` is not one of these.
    """

    checkpoint: str
    backbone_class: str
    backbone: str | None
    num_streams: int
    prefix_length: int | None
    smoothing: float
    init: str | None
    transform: str
    trains: str
    trained_parameters: int
    parameters: int
    tokens: int
    sequence_length: int
    batch_size: int
    learning_rates: Mapping[str, float]
    schedule: str
    data: tuple[str, ...]
    command: str
    losses: Mapping[str, TextLosses] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    streams_only: bool = False
    kv: str = OWN
    new: str | None = None
    comparisons: tuple[Mapping[str, Any], ...] = ()
    controls: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.trains not in TRAINED_PARTS:
            raise ValueError(f"trains is {self.trains!r}, and must be one of {', '.join(TRAINED_PARTS)}.")


def model_card(facts: TrainingFacts) -> str:
    """The card as Markdown with a YAML header, for a checkpoint's `README.md`.

    Names may hold any character: they are in code spans, or escaped in YAML. The YAML names the backbone and the data
    only if they are on the Hub, which rejects other names there.
    """
    data = ModelCardData(
        base_model=hub_name(facts.backbone),
        datasets=list(facts.datasets) or None,
        library_name="parscale" if facts.streams_only else "transformers",
        pipeline_tag="text-generation",
        tags=["parscale"],
    )
    sections = [
        f"# {_plain(facts.checkpoint)}",
        _introduction(facts),
        "## Use",
        _use(facts),
        "## Numbers",
        _table(("", ""), _numbers(facts)),
        "## Training",
        _table(("", ""), _training(facts)),
        "The command:",
        _fenced(facts.command),
        "## Losses on held-out text",
        *_losses(facts.losses),
        *_by_place(facts),
        "## Limits",
        "The losses hold for text like the held-out text above. Streams trained on little text of one kind can do harm "
        "on another: measure on text outside the training domain before relying on the model. Each token costs "
        f"{facts.num_streams} times the backbone's arithmetic, and {_cache(facts)}. The backbone's limits and its "
        "license remain.",
        "## Versions",
        _table(("software", "version"), ((_code(name), _code(text)) for name, text in facts.versions.items()))
        or "Not recorded.",
        "## Citation",
        _fenced(CITATION, "bibtex"),
    ]
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"
    return str(ModelCard(printable_path(text)))  # a name may hold bytes that are not UTF-8


def _introduction(facts: TrainingFacts) -> str:
    backbone = facts.backbone_class if facts.backbone is None else f"{_code(facts.backbone)} ({facts.backbone_class})"
    differing = "each time behind a learned prefix of its own"
    if facts.kv == SHARED:
        differing = "once as it is and then each time behind a learned prefix of its own"
    return (
        f"{backbone} with {facts.num_streams} parallel streams (ParScale, "
        "[arXiv 2505.10475](https://arxiv.org/abs/2505.10475)): each token passes the backbone "
        f"{facts.num_streams} times, {differing}, and a small network mixes the results. "
        + ("Post-trained with `parscale`." if facts.new is None else "Trained from nothing with `parscale`.")
    )


def _cache(facts: TrainingFacts) -> str:
    if facts.kv == SHARED:
        return "the cache holds the backbone's keys and values, which all streams read"
    return f"the cache holds {facts.num_streams} times its keys and values"


def _use(facts: TrainingFacts) -> str:
    name = json.dumps(facts.checkpoint, ensure_ascii=False)
    call = f"load({name})"
    if facts.streams_only and hub_name(facts.backbone) is None:
        call = f'load({name}, backbone="...")  # the backbone\'s folder: these are the streams alone'
    return _fenced(
        "from transformers import AutoTokenizer\n\n"
        "from parscale import load\n\n"
        f"model = {call}\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name})\n"
        'inputs = tokenizer("def fibonacci(n):", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
        "python",
    )


def _numbers(facts: TrainingFacts) -> list[tuple[str, str]]:
    share = 100 * facts.trained_parameters / facts.parameters
    label = labels(ParScaleConfig)
    return [
        (label["num_streams"], str(facts.num_streams)),
        (label["transform"], _code(facts.transform)),
        (label["prefix_length"], "-" if facts.prefix_length is None else str(facts.prefix_length)),
        *([(label["kv"], _code(facts.kv))] if facts.kv != OWN else []),
        (label["smoothing"], f"{facts.smoothing:g}"),
        (label["init"], "-" if facts.init is None else _code(facts.init)),
        ("trained", TRAINED_PARTS[facts.trains]),
        *([("began as", f"random weights of {_code(facts.new)}")] if facts.new is not None else []),
        ("trained parameters", f"{facts.trained_parameters:,} of {facts.parameters:,} ({share:.2f} %)"),
    ]


def _training(facts: TrainingFacts) -> list[tuple[str, str]]:
    rates = ", ".join(f"{_code(name)} {rate:g}" for name, rate in facts.learning_rates.items())
    label = labels(TrainSettings)
    return [
        (label["tokens"], f"{facts.tokens:,}"),
        (label["sequence_length"], f"{facts.sequence_length:,}"),
        (label["batch_size"], f"{facts.batch_size:,}, of {facts.batch_size * facts.sequence_length:,} tokens"),
        ("learning rates, at their peak", rates),
        ("schedule", _plain(facts.schedule)),
        (label["data"], ", ".join(map(_code, facts.data))),
    ]


def _losses(losses: Mapping[str, TextLosses]) -> list[str]:
    if not losses:
        return ["Not measured."]
    rows, worse = [], []
    for text, (backbone, before, after) in losses.items():
        difference = None if after is None or backbone is None else after - backbone
        figures = ["-" if loss is None else f"{loss:.4f}" for loss in (backbone, before, after)]
        rows.append((_code(text), *figures, "-" if difference is None else f"{difference:+.4f}"))
        if difference is not None and difference >= 0:
            worse.append(_code(text))
    header = ("nats per token", "untouched backbone", "before training", "after training", "after, against backbone")
    verdict = [f"No gain over the backbone on: {', '.join(worse)}."] if worse else []
    return [_table(header, rows), *verdict]


def _by_place(facts: TrainingFacts) -> list[str]:
    """The model against the untouched backbone and against controls, and whether streams gain."""
    if not facts.comparisons:
        return []
    header = (
        "nats per token",
        "where",
        "documents",
        "against",
        "its loss",
        "this model's",
        "difference (95 % interval)",
    )
    rows = [
        (
            _code(entry["text"]),
            entry["where"],
            str(entry["documents"]),
            (NOT_TRAINED | dict(facts.controls))[entry["baseline"]],
            f"{entry['baseline_loss']:.4f}",
            f"{entry['loss']:.4f}",
            format_interval(entry),
        )
        for entry in facts.comparisons
        if entry["arm"] == TRAINED
    ]
    held = in_the_middle(facts.comparisons, TRAINED, [UNTOUCHED, *facts.controls])
    verdicts = [
        f"Streams in the middle of {_code(text)}: {verdict(held[text])}." if text in held else no_middle(_code(text))
        for text in dict.fromkeys(entry["text"] for entry in facts.comparisons)
    ]
    if not facts.controls:
        verdicts = [
            "A lower loss than the untouched backbone's is not yet a gain of streams. It was not measured whether the "
            "backbone trained alone, or one trained prefix, does as well after the same tokens."
        ]
    return [_table(header, rows), *verdicts]


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, or nothing without rows; a `|` in a cell is escaped, also in code."""
    head, body = list(header), [[cell.replace("|", r"\|") for cell in row] for row in rows]
    if not body:
        return ""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))


def _code(text: str) -> str:
    """A code span that shows a text unchanged, except for line breaks."""
    line = " ".join(text.splitlines())
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def _plain(text: str) -> str:
    """A text on one line, without characters that Markdown or HTML interprets."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", " ".join(text.split()))


def _fenced(text: str, language: str = "") -> str:
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return "\n".join((f"{ticks}{language}", *text.splitlines(), ticks))
