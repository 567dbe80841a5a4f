"""What several nodes have to have in common; with two real processes: `test_train_distributed.py`."""

from unittest import mock

import pytest
from accelerate import PartialState

from parscale.checkpoints.training.nodes import require_same_data

MINE = {"training data": "1", "eval data code": "2"}


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (MINE | {"training data": "3"}, "training data"),
        ({"training data": "1"}, "eval data code"),
        (MINE | {"eval data prose": "4"}, "eval data prose"),
    ],
    ids=["other contents", "one text less", "one text more"],
)
def test_other_data_is_refused(other, name, monkeypatch):
    state = mock.Mock(spec=PartialState, num_processes=3)
    monkeypatch.setattr("parscale.checkpoints.training.nodes.gather_object", lambda mine: [*mine, dict(MINE), other])
    with pytest.raises(ValueError, match=rf"^The {name} of process 2 is not that of process 0; give files of the same"):
        require_same_data(MINE, state)


def test_one_process_asks_nobody():
    require_same_data(MINE, mock.Mock(spec=PartialState, num_processes=1))
