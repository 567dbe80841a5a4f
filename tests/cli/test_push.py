"""`parscale push`, against a Hub whose client has the real one's methods and signatures."""

import json
import sys
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
from huggingface_hub import HfApi

import parscale
from parscale.checkpoints.training import upload
from parscale.cli.application import BAD_INPUT, run
from parscale.compat.hub import NO_ANSWER

ConnectError = sys.modules[NO_ANSWER.__module__].ConnectError  # of the client that the Hub's library has


@pytest.fixture
def hub(monkeypatch):
    """What is called of it is recorded; a call that the real client would not take raises `TypeError`."""
    client = create_autospec(HfApi)
    api = client.return_value
    api.create_repo.return_value = SimpleNamespace(repo_id="me/mine")
    api.upload_folder.return_value = SimpleNamespace(commit_url="https://the.hub/me/mine/commit/0")
    monkeypatch.setattr(upload, "HfApi", client)
    return api


@pytest.fixture
def trained(two_sets, tmp_path):
    folder = tmp_path / "trained"
    parscale.load(two_sets).save_pretrained(folder)
    (folder / "README.md").write_text("A card.")
    return folder


@pytest.mark.parametrize(("option", "private"), [([], None), (["--private"], True), (["--no-private"], False)])
def test_uploads_the_folder(hub, trained, capsys, option, private):
    assert run(["push", str(trained), "mine", "--json", *option]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"folder": str(trained), "uploaded_to": "https://the.hub/me/mine/commit/0"}
    assert hub.create_repo.call_args.args == ("mine",)
    assert hub.create_repo.call_args.kwargs["private"] is private
    assert hub.upload_folder.call_args.kwargs["repo_id"] == "me/mine"
    assert hub.upload_folder.call_args.kwargs["folder_path"] == trained


def test_a_public_repository_gets_nothing_private(hub, trained, capsys):
    hub.model_info.return_value = SimpleNamespace(private=False)
    assert run(["push", str(trained), "mine", "--private"]) == BAD_INPUT
    said = capsys.readouterr().err
    assert "me/mine exists and is public" in said
    assert "make it private in its settings on the Hub, or give another name" in said
    assert hub.model_info.call_args.args == ("me/mine",)
    assert not hub.upload_folder.called
    assert run(["push", str(trained), "mine"]) == 0


@pytest.mark.parametrize("option", [None, "--private", "--no-private"])
def test_a_result_is_uploaded_as_privately_as_said(monkeypatch, tmp_path, option):
    said = {"num_streams": 2, "backbone": {}, "finished_before": False, "losses": {}}
    monkeypatch.setattr("parscale.checkpoints.training.train.train", lambda *args, **options: said)
    monkeypatch.setattr("parscale.checkpoints.description.describe", lambda name: said)
    pushed = create_autospec(upload.push, return_value="https://the.hub")
    monkeypatch.setattr(upload, "push", pushed)
    arguments = ["train", "start", "--data", "a.txt", "--output", str(tmp_path), "--push-to-hub", "me/mine", "--json"]
    assert run([*arguments, *([] if option is None else [option])]) == 0
    wanted = {None: None, "--private": True, "--no-private": False}[option]
    pushed.assert_called_once_with(tmp_path, "me/mine", private=wanted)


@pytest.mark.parametrize("option", ["--private", "--no-private"])
def test_privacy_of_no_upload(tmp_path, capsys, option):
    assert run(["train", "start", "--data", "a.txt", "--output", str(tmp_path / "run"), option]) == BAD_INPUT
    assert f"{option} is of --push-to-hub: give both, or leave it out" in capsys.readouterr().err


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


@pytest.mark.parametrize("call", ["create_repo", "upload_folder"])
def test_a_hub_that_does_not_answer(hub, trained, capsys, call):
    getattr(hub, call).side_effect = ConnectError("Name or service not known")
    assert run(["push", str(trained), "mine"]) == BAD_INPUT
    said = capsys.readouterr().err
    assert said.endswith("the Hugging Face Hub cannot be reached: Name or service not known\n")
    assert said.count("\n") == 1


def test_a_name_that_none_can_have_is_said_before_training(two_sets, text_file, tmp_path, capsys):
    arguments = ["train", str(two_sets), "--data", str(text_file), "--output", str(tmp_path / "run")]
    assert run([*arguments, "--push-to-hub", "a b"]) == BAD_INPUT
    assert "'a b'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("new", [False, True])
def test_a_model_without_streams_is_refused_before_training(backbone, text_file, tmp_path, capsys, new):
    start = ["--from-config", str(backbone / "config.json"), "--tokenizer", str(backbone), "--num-streams", "1"]
    arguments = ["train", *(start if new else [str(backbone)]), "--data", str(text_file), "--sequence-length", "16"]
    assert run([*arguments, "--output", str(tmp_path / "run"), "--push-to-hub", "me/mine"]) == BAD_INPUT
    assert "--push-to-hub uploads checkpoints with streams, and " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
