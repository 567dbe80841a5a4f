"""`compare` against the paired t interval by hand, and against how often it covers the truth."""

import random

import pytest

from parscale.checkpoints.evaluation.comparison import compare
from parscale.checkpoints.evaluation.text_loss import DocumentLoss, Evaluation


def evaluation(losses, names=None, sequence_length=32):
    names = names or [str(index) for index in range(len(losses))]
    documents = tuple(DocumentLoss(name, loss, 10) for name, loss in zip(names, losses, strict=True))
    return Evaluation(0.0, 1.0, 10 * len(losses), sequence_length, documents)


def test_the_interval_by_hand():
    # differences -1, -2, -3: mean -2, standard deviation 1, error 1/sqrt(3), t(2 degrees, 95 %) = 4.302653
    result = compare(evaluation([4.0, 3.0, 2.0]), evaluation([5.0, 5.0, 5.0]))
    assert result.difference == pytest.approx(-2.0)
    assert result.low == pytest.approx(-2.0 - 4.302653 / 3**0.5, rel=1e-6)
    assert result.high == pytest.approx(-2.0 + 4.302653 / 3**0.5, rel=1e-6)
    assert (result.documents, result.improved, result.confidence) == (3, 3, 0.95)


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
        (evaluation([1.0, 2.0], sequence_length=16), "windows of 32 and 16 tokens"),
    ],
)
def test_refuses_what_cannot_be_paired(other, message):
    with pytest.raises(ValueError, match=message):
        compare(evaluation([1.0, 2.0]), other)


def test_refuses_a_single_document():
    with pytest.raises(ValueError, match="at least 2 documents, got 1"):
        compare(evaluation([1.0]), evaluation([2.0]))
