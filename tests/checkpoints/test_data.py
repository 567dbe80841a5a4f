"""Training text of every kind, and what is said of text that is none."""

import gzip
import json
import re

import datasets
import pytest

from parscale.checkpoints.data import open_source, open_sources

ROWS = [{"text": "first", "other": 1}, {"text": "  ", "other": 2}, {"text": "s\u00e9cond\nline", "other": 3}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def texts(name, **options):
    return [text for _, text in open_source(str(name), **options)]


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.md"
    path.write_text("one\n\ntwo\n")
    assert list(open_source(str(path))) == [(str(path), "one\n\ntwo\n")]


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "jsonl.gz"])
def test_json_lines(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(LINES.encode()) if suffix.endswith("gz") else LINES.encode())
    assert list(open_source(str(path))) == [(f"{path}:1", "first"), (f"{path}:3", "s\u00e9cond\nline")]


@pytest.mark.parametrize("streaming", [False, True])
def test_tables(tmp_path, streaming):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    assert texts(path, streaming=streaming) == ["first", "s\u00e9cond\nline"]


def test_a_folder_is_its_files_with_text(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("beta")
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "c.jsonl").write_text(LINES)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0\xff")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x").write_text("hidden too")
    with pytest.warns(UserWarning, match="1 of 5 files are not text"):
        assert texts(tmp_path) == ["alpha", "first", "s\u00e9cond\nline", "beta"]


def test_a_character_at_the_border_of_what_is_looked_at(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 8191 + "\u00e9" + "y")
    assert len(texts(tmp_path)[0]) == 8193


@pytest.mark.parametrize(("streaming", "name"), [(False, "me/data"), (True, "me/data:small")])
def test_datasets_by_name(monkeypatch, streaming, name):
    """The Hub stands in as a function that notes what it was asked for."""
    asked = []

    def load_dataset(path, config, **options):
        asked.append((path, config, options))
        rows = datasets.Dataset.from_list([{"body": f"{number}"} for number in range(40)])
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source(name, text_column="body", streaming=streaming, seed=1)
    first, again = ([text for _, text in source] for _ in range(2))
    assert first == again
    assert sorted(first, key=int) == [str(number) for number in range(40)]
    assert (first != sorted(first, key=int)) is streaming
    assert asked == [("me/data", "small" if streaming else None, {"split": "train", "streaming": streaming})]


def write(path, contents):
    path.write_bytes(contents)
    return str(path)


@pytest.mark.parametrize(
    ("name", "contents", "said"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n\t\n", "a.txt holds nothing but white space"),
        ("a.txt", b"\xff\xfe\x00\x01", "a.txt is not text in UTF-8: byte 0"),
        ("a.bin", b"abc\0def", "a.bin is a binary file"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2, is not JSON"),
        ("a.jsonl", b'["text"]\n', "a.jsonl, line 1, is no JSON object but a list"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', "line 1, has no column 'text'; it has: 'body', 'id'. Name the one"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: column 'text' is no text but a int"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl is not text in UTF-8"),
        ("a.jsonl", b'{"text": " "}\n', "a.jsonl holds no text"),
        ("a.jsonl.gz", b"no gzip at all", "is no whole gzip file"),
        ("a.jsonl.gz", gzip.compress(LINES.encode() * 99)[:-20], "is no whole gzip file"),
        ("a.parquet", b"no table at all", "a.parquet cannot be read"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, name, contents, said):
    path = write(tmp_path / name, contents)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        list(open_sources([path])[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.txt", "no/such/folder/at/all", "./here", "missing.jsonl"])
def test_a_missing_file_is_no_dataset(name):
    with pytest.raises(ValueError, match="does not exist; give a text file, a folder"):
        open_source(name)


def test_a_dataset_that_cannot_be_loaded(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("no way to the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"nor a dataset that can be loaded: no way to the Hub$"):
        open_source("wikitext")


def test_without_the_package_datasets(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the package datasets: pip install 'parscale\[train\]'"):
        open_source("wikitext")


def test_a_folder_without_text(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\0\xff")
    with pytest.raises(ValueError, match=r"holds no file with text \(1 files were looked at\)"):
        open_source(str(tmp_path))
