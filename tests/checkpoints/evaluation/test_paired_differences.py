"""What an interval is said to show."""

import pytest

from parscale.checkpoints.evaluation.paired_differences import direction


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-2.0, -1.0, "lower"),
        (1.0, 2.0, "higher"),
        (-1.0, 1.0, "no difference that these documents show"),
        (None, None, "there is no interval with one document"),
    ],
)
def test_where_a_difference_lies(low, high, said):
    assert direction({"low": low, "high": high}) == said
