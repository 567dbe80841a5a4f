"""`compare` against scipy's paired t interval, and against how often it covers the truth."""

import random

import pytest
from scipy.stats import ttest_rel

from parscale.checkpoints.evaluation.comparison import compare
from parscale.checkpoints.evaluation.controls import crossed_interval
from parscale.checkpoints.evaluation.text_loss import DocumentLoss, Evaluation


def evaluation(losses, names=None, sequence_length=32):
    names = names or [str(index) for index in range(len(losses))]
    documents = tuple(DocumentLoss(name, loss, 10) for name, loss in zip(names, losses, strict=True))
    return Evaluation(0.0, 1.0, 10 * len(losses), sequence_length, documents)


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_is_the_paired_t_interval(confidence):
    losses, others = [4.0, 3.0, 5.5], [5.0, 5.0, 5.0]
    result = compare(evaluation(losses), evaluation(others), confidence=confidence)
    expected = ttest_rel(losses, others).confidence_interval(confidence)
    assert result.difference == pytest.approx((-1.0 - 2.0 + 0.5) / 3)
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high))
    assert (result.documents, result.improved, result.confidence) == (3, 2, confidence)


def test_pairing_removes_what_documents_have_in_common():
    result = compare(evaluation([1.0, 5.0, 9.0]), evaluation([1.5, 5.5, 9.5]))
    assert (result.low, result.difference, result.high) == pytest.approx((-0.5, -0.5, -0.5))


def test_covers_the_truth_as_often_as_it_says():
    draw = random.Random(0)
    runs, covered = 2000, 0
    for _ in range(runs):
        result = compare(evaluation([draw.gauss(0.3, 1.0) for _ in range(8)]), evaluation([0.0] * 8), confidence=0.9)
        covered += result.low <= 0.3 <= result.high
    assert covered / runs == pytest.approx(0.9, abs=4 * (0.9 * 0.1 / runs) ** 0.5)  # four standard errors


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (evaluation([1.0, 2.0], names=["a", "b"]), "different documents"),
        (evaluation([1.0, 2.0], sequence_length=16), "windows of 16 and 32 tokens"),
    ],
)
def test_refuses_what_cannot_be_paired(other, message):
    with pytest.raises(ValueError, match=message):
        compare(evaluation([1.0, 2.0]), other)


@pytest.mark.parametrize("confidence", [95, 1, 0, -0.5, float("nan")])
def test_refuses_a_confidence_that_no_interval_has(confidence):
    with pytest.raises(ValueError, match=r"confidence is .*, and must be between 0 and 1, such as 0.95"):
        compare(evaluation([1.0, 2.0]), evaluation([2.0, 2.5]), confidence=confidence)
    with pytest.raises(ValueError, match=r"confidence is .*, and must be between 0 and 1, such as 0.95"):
        crossed_interval([[1.0, 2.0], [2.0, 4.0]], confidence=confidence)


def test_refuses_a_single_document():
    with pytest.raises(ValueError, match="at least 2 documents, got 1"):
        compare(evaluation([1.0]), evaluation([2.0]))
