"""huggingface_hub's client says by an error of its own that nobody answered, and the Hub's refusals are others."""

import socket

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from parscale.compat import hub as compat


def test_no_answer_is_one_class_of_the_client_that_is_no_error_of_the_system():
    found = [base for base in HfHubHTTPError.__bases__ if not issubclass(base, OSError)]
    assert found == [compat.NO_ANSWER]
    assert issubclass(compat.NO_ANSWER, Exception)
    assert compat.NO_ANSWER is not Exception
    assert not compat.NO_ANSWER.__module__.startswith("huggingface_hub")


@pytest.mark.parametrize("error", [HfHubHTTPError, RepositoryNotFoundError])
def test_an_answer_that_refuses_is_an_error_of_the_client_and_of_the_system(error):
    """By which the two are told apart."""
    assert issubclass(error, OSError)
    assert issubclass(error, compat.NO_ANSWER)


def test_a_port_at_which_nobody_listens(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # it does not listen
        api = HfApi(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}", token="t")
        with pytest.raises(compat.NO_ANSWER) as caught:
            api.whoami()
    assert not isinstance(caught.value, OSError)
