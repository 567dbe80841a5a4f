"""Controls: the baselines that a gain of streams is compared with, and the interval that tells whether it is a gain.

Streams gain if they beat one trained prefix *and* the backbone trained alone, after the same tokens in the same order,
in the middle of documents, with an interval over documents and seeds that excludes zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student

from parscale import ParScaleConfig, unwrap, wrap
from parscale.checkpoints.evaluation.text_loss import Evaluation
from parscale.config import PREFIX, PROMPT
from parscale.streams.naming import TRANSFORM_PART, part_of

NOTHING = "nothing"
"""`Arm.trains` of an arm that is measured as it is."""

BACKBONE = "backbone"
"""`Arm.trains` of a backbone that is trained alone."""

STREAMS = "streams"
"""`Arm.trains` of streams, or of one prefix, on a frozen backbone."""

BOTH = "both"
"""`Arm.trains` of streams, or of one prefix, with the backbone."""

ADAPTER = "adapter"
"""`Arm.trains` of low-rank differences on a frozen backbone."""


@dataclass(frozen=True)
class Arm:
    """One way to spend the training tokens.

    Attributes:
        name: its name in results.
        trains: `NOTHING`, `BACKBONE`, `STREAMS` (or the one prefix), `BOTH`, or `ADAPTER`.
        title: its name in tables.
        streams: whether it has the P streams under study.
        prefix: whether it has one trained prefix.
        long: whether that prefix has P * T tokens, as many as P streams have, rather than T. Where they share keys,
            and stream 0 has no prefix, they have (P - 1) * T, and it is the stronger control.
    """

    name: str
    trains: str
    title: str = ""
    streams: bool = False
    prefix: bool = False
    long: bool = False


ARMS = (
    Arm("untouched", NOTHING, title="untouched backbone"),
    Arm("alone", BACKBONE, title="backbone alone, trained"),
    Arm("prefix", STREAMS, title="one prefix of T, backbone frozen", prefix=True),
    Arm("long-prefix", STREAMS, title="one prefix of P*T, backbone frozen", prefix=True, long=True),
    Arm("lora", ADAPTER, title="LoRA of as many parameters as the streams"),
    Arm("untrained", NOTHING, title="streams, untrained", streams=True),
    Arm("frozen", STREAMS, title="streams, backbone frozen", streams=True),
    Arm("prefix-and-backbone", BOTH, title="one prefix of T and backbone", prefix=True),
    Arm("long-prefix-and-backbone", BOTH, title="one prefix of P*T and backbone", prefix=True, long=True),
    Arm("streams-and-backbone", BOTH, title="streams and backbone", streams=True),
)
"""Arms with P streams come after the arms that they are compared with."""

HELD_AGAINST = {
    "untrained": ("untouched",),
    "alone": ("untouched",),
    "prefix": ("untouched",),
    "long-prefix": ("untouched",),
    "lora": ("untouched",),
    "frozen": ("untouched", "alone", "prefix", "long-prefix", "lora"),
    "prefix-and-backbone": ("untouched", "alone"),
    "long-prefix-and-backbone": ("untouched", "alone"),
    "streams-and-backbone": ("untouched", "alone", "prefix-and-backbone", "long-prefix-and-backbone"),
}
"""The baselines of each arm in a report."""


def prepare_arm(arm: Arm, model: Any, config: ParScaleConfig, calibration: torch.Tensor | None = None) -> Any:
    """Prepares a plain model for an arm, in place, before training: adds its streams, freezes what it does not train.

    One prefix is built as two streams that start from the same text and are mixed evenly, whatever `config.smoothing`
    is. They get the same gradients and stay equal but for rounding, so their mixture equals each of them; the
    aggregator gets no gradient. The model is that of one trained prefix, at twice its cost, and all code that trains,
    saves and loads streams works on it.

    Args:
        arm: one of `ARMS`; the caller adds the adapter of an adapter arm.
        model: a plain causal language model.
        config: of the P streams in question.
        calibration: token ids `(P, T)`, real text; streams start from a row each (those that share keys, all but stream
            0, leave the last row out), one prefix of T tokens from the first row, and one of P * T tokens from all: the
            prefixes of the P streams one behind the other, which disturb the backbone less than a text of that length.
            Without it the backbone samples the texts of streams.

    Returns:
        The same object.

    Raises:
        ValueError: as in `parscale.wrap`; or one prefix has no calibration, or one that is too small.
    """
    if arm.streams:
        texts = None if calibration is None else calibration[: config.num_transformed, : config.prefix_length]
        wrap(model, config, calibration=texts)
    elif arm.prefix:
        _add_one_prefix(arm, model, config, calibration)
    if arm.trains == STREAMS:
        model.freeze_backbone()
    elif arm.trains == NOTHING:
        model.requires_grad_(False)
    return model


def _add_one_prefix(arm: Arm, model: Any, config: ParScaleConfig, calibration: torch.Tensor | None) -> None:
    """Adds one prefix, of T tokens, or of the P times T with which P streams start, one behind the other."""
    texts, T = config.num_streams if arm.long else 1, config.prefix_length
    if calibration is None or len(calibration) < texts or calibration.shape[1] < T:
        given = "none" if calibration is None else f"{calibration.shape[0]} of {calibration.shape[1]} tokens"
        raise ValueError(
            f"One prefix of {texts * T} tokens starts from {texts} {'text' if texts == 1 else 'texts'} of {T} tokens; "
            f"give calibration of that size (it is {given})."
        )
    transform = PROMPT if config.transform == PROMPT else PREFIX
    # with other weights than the mean's, rounding alone would train the aggregator, and it would tell the two apart
    equal = ParScaleConfig(2, T, smoothing=1.0, seed=config.seed, transform=transform)
    if not arm.long:
        wrap(model, equal, calibration=calibration[:1, :T].expand(2, -1))
        return
    wrap(model, replace(equal, num_streams=texts), calibration=calibration[:texts, :T])
    behind = {
        name: torch.cat(list(tensor.detach()), dim=-2)  # (P, ..., T, D) to (..., P * T, D)
        for name, tensor in model.parscale.tensors(model.parscale.active).items()
        if part_of(name) == TRANSFORM_PART
    }
    unwrap(model)
    wrap(model, replace(equal, prefix_length=texts * T, init="random"))
    with torch.no_grad():
        for name, tensor in model.parscale.tensors(model.parscale.active).items():
            if name in behind:
                tensor.copy_(behind[name].expand_as(tensor))


@dataclass(frozen=True)
class Interval:
    """The difference between the losses of two arms; negative is better.

    Attributes:
        difference: the mean over seeds and documents, which all have the same weight.
        low: lower end of its interval, in nats like the losses.
        high: upper end, in nats.
        seeds: number of seeds; with one seed, the interval is over documents alone.
        documents: number of documents.
    """

    difference: float
    low: float
    high: float
    seeds: int
    documents: int


def crossed_interval(differences: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """The interval of the mean of paired differences, with seeds and documents both as samples.

    Every seed is measured on the same documents, so d(s, i) = mean + seed(s) + document(i) + rest(s, i): two crossed
    random factors. With the mean squares MS of the two-way table without replication, the interval is the widest of
    three, each by Student's t: that of the variance (MS_seeds + MS_documents - MS_rest) / (S * D) with Satterthwaite's
    degrees of freedom, that over seeds alone, MS_seeds / (S * D) with S - 1, and that over documents alone,
    MS_documents / (S * D) with D - 1. The first is left out unless both MS_seeds and MS_documents are above MS_rest:
    where one is not, that factor does not show, and the variance may be negative. With few seeds the first by itself
    is too narrow. With one seed the result is the t interval over documents: it predicts the result on more documents,
    not of more training runs.

    Args:
        differences: `(S, D)`, one row for each seed.
        confidence: between 0 and 1.

    Returns:
        The mean and its interval.

    Raises:
        ValueError: `differences` is not a table, has fewer than two documents or numbers that are not finite, or
            `confidence` is out of range.
    """
    check_confidence(confidence)
    table = np.asarray(differences, dtype=np.float64)
    if table.ndim != 2 or not table.shape[0] or table.shape[1] < 2:
        raise ValueError(
            f"An interval needs a table with a row for each seed and at least 2 documents, got the shape {table.shape}."
        )
    if wrong := int((~np.isfinite(table)).sum()):
        raise ValueError(
            f"{wrong} of {table.size} differences are NaN or infinite, and an interval needs finite ones: a model has "
            "diverged, or a loss was not measured. Train or measure it again, or leave it out."
        )
    seeds, documents = table.shape
    mean = float(table.mean())
    widths = [student.ppf((1 + confidence) / 2, freedom) * variance**0.5 for variance, freedom in _variances(table)]
    half = float(max(widths))
    return Interval(mean, mean - half, mean + half, seeds, documents)


def check_confidence(confidence: float) -> None:
    """Refuses what no interval can have.

    Raises:
        ValueError: it is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, and must be between 0 and 1, such as 0.95.")


def _variances(table: NDArray[np.float64]) -> list[tuple[float, float]]:
    """Variances of the grand mean, each with its degrees of freedom."""
    seeds, documents = table.shape
    if seeds == 1:
        return [(float(table.var(ddof=1)) / documents, documents - 1)]
    rows, columns, mean = table.mean(1), table.mean(0), table.mean()
    of_seeds = documents * float(((rows - mean) ** 2).sum()) / (seeds - 1)
    of_documents = seeds * float(((columns - mean) ** 2).sum()) / (documents - 1)
    free = (seeds - 1) * (documents - 1)
    rest = float(((table - rows[:, None] - columns + mean) ** 2).sum()) / free
    found = [(of_seeds / table.size, seeds - 1.0), (of_documents / table.size, documents - 1.0)]
    total = of_seeds + of_documents - rest
    if min(of_seeds, of_documents) > rest:
        parts = of_seeds**2 / (seeds - 1) + of_documents**2 / (documents - 1) + rest**2 / free
        found.append((total / table.size, total**2 / parts))
    return found


def hold_against(
    arm: str,
    baseline: str,
    text: str,
    evaluations: Mapping[str, Sequence[Mapping[str, Evaluation]]],
    tokens: int,
) -> list[dict[str, Any]]:
    """Compares one arm with another, by place: the entries of `"comparisons"` in `benchmarks/results/evidence.json`.

    Args:
        arm: name of the arm.
        baseline: name of the arm to compare with.
        text: what the documents are.
        evaluations: by name of the arm, one result of `evaluate_places` for each seed. An arm that does not depend on
            the seed may have one.
        tokens: number of training tokens of the arms.

    Returns:
        One entry for each place.

    Raises:
        ValueError: the arms were measured on different documents or windows, or with different numbers of seeds.
    """
    entries = []
    for where in evaluations[arm][0]:
        differences = paired(
            [of_seed[where] for of_seed in evaluations[arm]], [of_seed[where] for of_seed in evaluations[baseline]]
        )
        interval = asdict(crossed_interval(differences))
        entries.append({"arm": arm, "baseline": baseline, "text": text, "where": where, "tokens": tokens} | interval)
    return entries


def paired(arm: Sequence[Evaluation], baseline: Sequence[Evaluation]) -> NDArray[np.float64]:
    """The differences `(S, D)` of the documents' losses, seed by seed.

    Raises:
        ValueError: as in `hold_against`.
    """
    seeds = max(len(arm), len(baseline))
    if not arm or not baseline or any(len(side) not in (1, seeds) for side in (arm, baseline)):
        raise ValueError(
            f"The arms have {len(arm)} and {len(baseline)} seeds; measure both with the same seeds, or measure an arm "
            "that does not train once."
        )
    measured_on = {tuple(document.name for document in evaluation.documents) for evaluation in (*arm, *baseline)}
    if len(measured_on) > 1:
        raise ValueError("The evaluations used different documents; measure all models on the same ones.")
    windows = {evaluation.sequence_length for evaluation in (*arm, *baseline)}
    if len(windows) > 1:
        lengths = " and ".join(map(str, sorted(windows)))
        raise ValueError(f"The evaluations have windows of {lengths} tokens; measure all models with the same.")
    table, other = (
        np.array([[document.loss for document in evaluation.documents] for evaluation in side])
        for side in (arm, baseline)
    )
    return table - other
