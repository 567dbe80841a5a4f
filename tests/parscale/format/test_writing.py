"""How folders are written: an older save is replaced as a whole, and what fails changes nothing."""

import copy
import errno
import fcntl
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from killed_saves import kill_at_move
from model_calls import exact_logits_of
from peft_versions import peft_for_add_adapter

from parscale import load, unwrap, wrap
from parscale.format import moving, working
from parscale.format.folders import Checkpoint
from parscale.format.staging import require_writable_folder


def test_an_older_save_is_replaced_and_other_files_stay(wrapped, tiny, tmp_path):
    wrapped.save_pretrained(tmp_path, max_shard_size="30KB")
    (tmp_path / "optimizer.pt").write_text("mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "streams.safetensors").write_text("mine")
    model = wrap(tiny(), 2, prefix_length=3, init="random")
    model.save_pretrained(tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_parscale.py",
        "notes/streams.safetensors",
        "optimizer.pt",
    ]
    assert torch.equal(exact_logits_of(load(tmp_path)), exact_logits_of(model))
    wrapped.save_pretrained(tmp_path, max_shard_size="30KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert torch.equal(exact_logits_of(load(tmp_path)), exact_logits_of(wrapped))


def test_folders_above_are_made(wrapped, tmp_path):
    wrapped.save_streams(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c" / "streams.safetensors").exists()


def test_a_relative_path(wrapped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrapped.save_pretrained("saved")
    assert torch.equal(exact_logits_of(load("saved")), exact_logits_of(wrapped))


@pytest.fixture
def like_windows(monkeypatch):
    """Calls of the operating system as Windows answers them."""

    def open_file(path, flags, *args, real=os.open, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "a folder is not opened", os.fspath(path))
        return real(path, flags, *args, **options)

    def fsync(descriptor, real=os.fsync):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "not open for writing")
        real(descriptor)

    def unlink(path, *args, real=os.unlink, **options):
        if os.path.realpath(path) in [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()]:
            raise PermissionError(errno.EACCES, "the file is open", os.fspath(path))
        real(path, *args, **options)

    for name, call in (("open", open_file), ("fsync", fsync), ("unlink", unlink)):
        monkeypatch.setattr(os, name, call)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # rmtree opens folders with them
    monkeypatch.setattr(working, "fcntl", None)
    monkeypatch.setattr(moving, "_WINDOWS", True)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the stand-in needs the open files")
@pytest.mark.parametrize("method", ["save_pretrained", "save_streams"])
def test_windows_saves_too(wrapped, tiny, tmp_path, like_windows, method):
    for model in (wrapped, wrap(tiny(), 2, prefix_length=3, init="random")):  # the second time over the first
        getattr(model, method)(tmp_path / "output")
        assert [path.name for path in tmp_path.iterdir()] == ["output"]
        assert not any(path.name.startswith(".") for path in (tmp_path / "output").iterdir())
    assert load(tmp_path / "output", backbone=tiny() if method == "save_streams" else None).num_streams == 2


def test_windows_removes_leftovers(tmp_path, like_windows):
    leftover = working.working_folder(tmp_path, "old")
    leftover.mkdir()
    (leftover / working.MARKER).touch()
    working.remove_leftovers(tmp_path)
    assert not any(tmp_path.iterdir())


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["save_pretrained", "save_streams"])
def save(request):
    return request.param


@pytest.fixture(params=["a new folder", "an existing folder"])
def output(request, save, tiny, tmp_path):
    if request.param == "an existing folder":
        getattr(wrap(tiny(), 2, init="random"), save)(tmp_path / "output")
    return tmp_path / "output"


def test_a_full_disk_changes_nothing(wrapped, save, output, tmp_path):
    """The operating system refuses files of more than a few KB."""
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"Nothing was saved: File too large; free some space.*output"):
            getattr(wrapped, save)(output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before


def test_a_disk_that_fills_up_at_the_end_changes_nothing(wrapped, save, output, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    before = contents(tmp_path)
    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space left on device; free some space"):
        getattr(wrapped, save)(output)
    monkeypatch.undo()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("stop", [OSError(errno.EIO, "broken"), KeyboardInterrupt()], ids=["error", "interrupted"])
def test_an_unfinished_move_is_undone(wrapped, save, output, stop, tmp_path, monkeypatch):
    """Each of the moves fails once."""
    from parscale.format import staging

    for number in range(1, 20):
        before, moves = contents(tmp_path), 0

        def move(source, destination, replace=staging.os.replace, last=number):
            nonlocal moves
            moves += 1
            if moves == last:
                raise stop
            replace(source, destination)

        output.mkdir(exist_ok=True)
        monkeypatch.setattr(staging.os, "replace", move)
        try:
            getattr(wrapped, save)(output)
        except (OSError, KeyboardInterrupt):
            monkeypatch.undo()
            assert contents(tmp_path) == before
        else:
            monkeypatch.undo()
            break
    assert number > 2
    assert torch.equal(load_again(output, wrapped), exact_logits_of(wrapped))


def load_again(folder, model):
    if (folder / "config.json").exists():
        return exact_logits_of(load(folder))
    backbone = unwrap(copy.deepcopy(model))
    return exact_logits_of(load(folder, backbone=backbone))


def test_a_folder_that_cannot_be_written(wrapped, save, output, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    before = contents(tmp_path)
    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied; give a folder that can be written.*output"):
        getattr(wrapped, save)(output)
    monkeypatch.undo()
    assert contents(tmp_path) == before


def test_a_file_in_place_of_the_folder(wrapped, save, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file: give a folder"):
        getattr(wrapped, save)(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_without_a_name(wrapped, tmp_path, monkeypatch):
    """It is not the current one."""
    monkeypatch.chdir(tmp_path)
    for save in (wrapped.save_pretrained, wrapped.save_streams):
        with pytest.raises(ValueError, match=r"has an empty name: give one, or '\.' for the current folder"):
            save("")
    assert not list(tmp_path.iterdir())
    wrapped.save_streams(".")
    assert (tmp_path / "streams.safetensors").exists()


# -- killed while files move


def test_streams_are_refused_in_a_full_checkpoint_whose_save_was_cut_off(wrapped, tiny, tmp_path):
    """Its `config.json` is not in its place, but comes back before the folder is judged."""
    peft = peft_for_add_adapter(tiny())
    wrapped.save_pretrained(tmp_path)
    before = contents(tmp_path)
    other = wrap(tiny(), 4, prefix_length=3, init="random")
    adapted = wrap(tiny(), 4, prefix_length=3, init="random")
    adapted.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    for save in (other.save_streams, adapted.save_pretrained):
        assert kill_at_move(2, lambda: wrapped.save_pretrained(tmp_path))
        assert not (tmp_path / "config.json").exists()
        with pytest.raises(ValueError, match="holds a full checkpoint"):
            save(tmp_path)
        assert contents(tmp_path) == before


def test_sets_of_a_checkpoint_whose_save_was_cut_off_are_replaced(wrapped, tiny, tmp_path):
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "code" / "streams.safetensors").exists()
    assert kill_at_move(2, lambda: wrapped.save_pretrained(tmp_path))
    wrap(tiny(), 2, prefix_length=3, init="random").save_pretrained(tmp_path)
    assert not (tmp_path / "code").exists()


def test_streams_beside_an_adapter_are_all_there_or_said_to_be_missing(wrapped, tiny, tmp_path):
    """Killed at each move, and again while the next save ends the moves."""
    peft = peft_for_add_adapter(tiny())
    tiny().save_pretrained(tmp_path / "plain")
    wrapped.config.name_or_path = str(tmp_path / "plain")
    wrapped.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    folder = tmp_path / "adapted"
    wrapped.save_pretrained(folder)
    complete = {path.name for path in folder.iterdir()}
    assert {"parscale_config.json", "streams.safetensors", "adapter_model.safetensors"} <= complete

    def require_all_or_none():
        if (folder / "parscale_config.json").exists():
            assert complete <= {path.name for path in folder.iterdir()}
        else:
            with pytest.raises(FileNotFoundError, match=r"A save was cut off: move the files in .* to "):
                Checkpoint(folder).kind()

    number = 1
    while kill_at_move(number, lambda: wrapped.save_pretrained(folder)):
        require_all_or_none()
        kill_at_move(2, lambda: require_writable_folder(folder))
        require_all_or_none()
        require_writable_folder(folder)
        assert {path.name for path in folder.iterdir()} == complete
        number += 1
    assert number > 2 * len(complete)


def test_a_missing_file_where_a_save_was_cut_off(wrapped, tiny, tmp_path):
    wrapped.save_pretrained(tmp_path)
    kill_at_move(6, lambda: wrapped.save_pretrained(tmp_path))
    assert not (tmp_path / "model.safetensors").exists()
    checkpoint = Checkpoint(tmp_path)
    for read in (checkpoint.weights, checkpoint.streams):
        with pytest.raises(FileNotFoundError, match=r"missing\. A save was cut off: move the files in .* to "):
            read()
    tiny().config.save_pretrained(tmp_path)
    assert checkpoint.kind() == "plain backbone"
    with pytest.raises(ValueError, match=r"a plain model .* A save was cut off: move the files in .* to "):
        checkpoint.kind_with_streams()
