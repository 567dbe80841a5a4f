"""Compares two models on the same documents, by paired differences."""

from __future__ import annotations

from dataclasses import dataclass

from parscale.checkpoints.evaluation.controls import crossed_interval, paired
from parscale.checkpoints.evaluation.text_loss import Evaluation


@dataclass(frozen=True)
class Comparison:
    """The difference between the losses of two models, in nats per token; negative is better.

    Attributes:
        difference: the mean over documents of the difference in loss; every document has the same weight.
        low: lower end of the interval that holds the mean difference with probability `confidence`.
        high: upper end of that interval, in nats per token as all three.
        confidence: of the interval, between 0 and 1.
        documents: number of documents.
        improved: number of documents with a lower loss.
    """

    difference: float
    low: float
    high: float
    confidence: float
    documents: int
    improved: int


def compare(evaluation: Evaluation, baseline: Evaluation, *, confidence: float = 0.95) -> Comparison:
    """Compares two models' losses on the same documents by the t interval of the paired differences.

    The interval treats the documents as a sample of all such documents. So it predicts the result on more documents of
    this kind, not the result of more training runs.

    Args:
        evaluation: of the model.
        baseline: of the model to compare with.
        confidence: between 0 and 1.

    Returns:
        The mean difference with its interval.

    Raises:
        ValueError: the two were measured on different documents or windows, there are fewer than two documents, or
            `confidence` is out of range.
    """
    differences = paired([evaluation], [baseline])  # (1, documents)
    if differences.size < 2:
        raise ValueError(f"An interval needs at least 2 documents, got {differences.size}.")
    found = crossed_interval(differences, confidence=confidence)
    improved = int((differences < 0).sum())
    return Comparison(found.difference, found.low, found.high, confidence, found.documents, improved)
