"""Outputs that cannot be written, and what their errors say."""

import os

import pytest

from parscale.format.staging import require_new_folder, require_writable, require_writable_folder, staged


def make_pipe(path):
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.symlink_to("nowhere"), "is a link to nowhere, which does not exist"),
        (make_pipe, "neither a folder nor a file|a device or a pipe"),
        (lambda path: path.symlink_to("/dev/null"), "neither a folder nor a file|a device or a pipe"),
        (lambda path: path.symlink_to(path.name), "is a link to output"),
    ],
    ids=["dangling", "pipe", "device", "loop"],
)
@pytest.mark.parametrize("check", [require_new_folder, require_writable_folder, require_writable])
def test_outputs_that_are_neither_files_nor_folders(tmp_path, check, make, said):
    make(tmp_path / "output")
    with pytest.raises((ValueError, OSError), match=said):
        check(tmp_path / "output")
    assert os.listdir(tmp_path) == ["output"]


@pytest.mark.parametrize("check", [require_writable_folder, require_writable])
def test_a_place_that_cannot_be_written(check):
    with pytest.raises(OSError, match=r"Nothing was saved|cannot be written"):
        check("/proc/output")


def test_a_file_in_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"There is no folder .*nowhere to put figures\.json in; make it first"):
        require_writable(tmp_path / "nowhere" / "figures.json")


def test_folders_above_an_output_that_fails_are_not_left(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "a" / "b" / "model", last="config.json"):
        raise RuntimeError
    require_writable_folder(tmp_path / "a" / "b" / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["No space left on device (os error 28)", "I/O error: File too large (os error 27)"])
def test_a_full_disk_that_a_library_in_rust_reports(tmp_path, text):
    """As the tokenizers' writer does: by an Exception of no type of its own."""
    said = r"Nothing was saved: .*; free some space or give another folder"
    with pytest.raises(OSError, match=said), staged(tmp_path / "model", last="config.json"):
        raise Exception(text)


def test_an_error_about_another_file_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file.*source") as raised, staged(tmp_path / "model", last=""):
        (tmp_path / "source").read_text()
    assert "Nothing was saved" not in str(raised.value)
