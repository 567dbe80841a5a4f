"""`parscale push`, against a Hub whose client has the real one's methods and signatures."""

import json
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
from huggingface_hub import HfApi

import parscale
from parscale.checkpoints.training import model_card
from parscale.cli.application import BAD_INPUT, run


@pytest.fixture
def hub(monkeypatch):
    """What is called of it is recorded; a call that the real client would not take raises `TypeError`."""
    client = create_autospec(HfApi)
    api = client.return_value
    api.create_repo.return_value = SimpleNamespace(repo_id="me/mine")
    api.upload_folder.return_value = SimpleNamespace(commit_url="https://the.hub/me/mine/commit/0")
    monkeypatch.setattr(model_card, "HfApi", client)
    return api


@pytest.fixture
def trained(two_sets, tmp_path):
    folder = tmp_path / "trained"
    parscale.load(two_sets).save_pretrained(folder)
    (folder / "README.md").write_text("A card.")
    return folder


@pytest.mark.parametrize("private", [False, True])
def test_uploads_the_folder(hub, trained, capsys, private):
    assert run(["push", str(trained), "mine", "--json", *["--private"] * private]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"folder": str(trained), "uploaded_to": "https://the.hub/me/mine/commit/0"}
    assert hub.create_repo.call_args.args == ("mine",)
    assert hub.create_repo.call_args.kwargs["private"] is private
    assert hub.upload_folder.call_args.kwargs["repo_id"] == "me/mine"
    assert hub.upload_folder.call_args.kwargs["folder_path"] == trained


def test_a_folder_without_a_card(hub, trained, capsys):
    (trained / "README.md").unlink()
    assert run(["push", str(trained), "mine"]) == BAD_INPUT
    assert "holds no README.md; write its model card first" in capsys.readouterr().err
    assert not hub.create_repo.called


def test_a_hub_that_refuses(hub, trained, capsys):
    hub.create_repo.side_effect = OSError("401 Unauthorized: log in with hf auth login")
    assert run(["push", str(trained), "mine"]) == BAD_INPUT
    assert "401 Unauthorized" in capsys.readouterr().err
    assert not hub.upload_folder.called
