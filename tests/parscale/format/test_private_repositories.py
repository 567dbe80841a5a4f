"""What private and pinned repositories need reaches every question to the Hub."""

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from parscale import load, wrap
from parscale.format import pretrained


@pytest.fixture
def hub(tiny, tmp_path, monkeypatch):
    """The questions that are asked, as triples of a repository, a token and a revision."""
    tiny().save_pretrained(tmp_path / "org" / "backbone")
    model = wrap(tiny(), 2, prefix_length=3, init="random")
    model.add_streams("other", 2, prefix_length=3, init="random")
    model.save_pretrained(tmp_path / "org" / "full")
    model.config.name_or_path = "org/backbone"
    model.save_streams(tmp_path / "org" / "streams")
    asked = []

    def download(repo, name, token=None, revision=None, subfolder="", **options):
        asked.append((repo, token, revision))
        path = tmp_path / repo / subfolder / name
        if not path.exists():
            raise LocalEntryNotFoundError("no such file")
        return path

    def read(reader, source, *arguments, token=None, revision=None, real=pretrained.read_pretrained, **options):
        asked.append((source, token, revision))
        return real(reader, tmp_path / source, *arguments, **options)

    monkeypatch.setattr("parscale.format.folders.hf_hub_download", download)
    monkeypatch.setattr("parscale.format.models.read_pretrained", read)
    return asked


def test_a_full_checkpoint(hub):
    assert list(load("org/full", token="secret", revision="v1").parscale.sets) == ["default", "other"]
    assert set(hub) == {("org/full", "secret", "v1")}


def test_streams_and_the_backbone_that_they_name(hub):
    """The revision is that of the streams' repository."""
    assert load("org/streams", token="secret", revision="v1").num_streams == 2
    assert set(hub) == {("org/streams", "secret", "v1"), ("org/backbone", "secret", None)}


def test_a_further_set(hub, tiny):
    model = wrap(tiny(), 1)
    model.load_streams("org/streams", "more", token="secret", revision="v1")
    assert list(model.parscale.sets) == ["default", "more"]
    assert set(hub) == {("org/streams", "secret", "v1")}
