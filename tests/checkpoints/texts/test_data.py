"""Training text of every kind, and what is said of text that is none."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import socket
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from parscale.checkpoints.texts.documents import Source
from parscale.checkpoints.texts.sources import open_source, open_sources, read_documents, refuse_output_in_data

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


def zstandard(contents):
    return pyarrow.compress(contents, codec="zstd", asbytes=True)


COMPRESSED = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard}
MARKS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16": b"",
    "utf-16-le": b"\xff\xfe",
    "utf-16-be": b"\xfe\xff",
    "utf-32": b"",
}


def separated(delimiter):
    """The rows with a header, and a cell that holds line breaks, quotes and separators."""
    file = io.StringIO()
    writer = csv.DictWriter(file, ["text", "other"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("a.jsonl", LINES),
        ("a.NDJSON", LINES),
        ("a.json", LINES),
        ("a.JSON", LINES),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", "\n\n".join(json.dumps(row, indent=2) for row in ROWS)),
        ("a.json", json.dumps({"data": ROWS})),
        ("a.json", json.dumps({"version": "1.0", "authors": ["x"], "data": ROWS}, indent=1)),
        ("a.csv", separated(",")),
        ("a.tsv", separated("\t")),
        ("a.csv", "\n" + separated(",").replace("\r\n", "\n")),
    ],
)
@pytest.mark.parametrize(
    ("compression", "encoding"),
    [
        *(("", encoding) for encoding in MARKS),
        *((compression, "utf-8") for compression in COMPRESSED),
        (".gz", "utf-16"),
    ],
)
def test_rows_are_documents_in_any_form(tmp_path, name, contents, compression, encoding):
    path = tmp_path / f"{name}{compression}"
    path.write_bytes(COMPRESSED[compression](MARKS[encoding] + contents.encode(encoding)))
    assert texts(path) == ["first", "s\u00e9cond\nline"]
    assert [text for _, text in read_documents([path])] == ["first", "s\u00e9cond\nline"]
    (tmp_path / "sub").mkdir()
    path.rename(tmp_path / "sub" / path.name)
    assert texts(tmp_path) == ["first", "s\u00e9cond\nline"]


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("encoding", MARKS)
def test_text_begins_behind_a_byte_order_mark(tmp_path, compression, encoding):
    contents = 'd\u00e9f f(x):\r\n    return "\ufeff"\n'
    path = tmp_path / f"a.py{compression}"
    path.write_bytes(COMPRESSED[compression](MARKS[encoding] + contents.encode(encoding)))
    expected = [(str(path), contents.replace("\r\n", "\n"))]
    assert list(open_source(str(path))) == read_documents([path]) == list(open_source(str(tmp_path))) == expected


def test_json_under_the_name_of_text_is_text(tmp_path):
    for name in ("a.txt", "a.md", "a"):
        (tmp_path / name).write_text(LINES)
        assert texts(tmp_path / name) == [LINES]


def test_one_row_alone_and_another_column(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"body": "one", "parts": [{"body": "not this"}]}, indent=2))
    assert texts(path, text_column="body") == ["one"]


def test_files_to_measure_on_may_be_empty(tmp_path):
    path = tmp_path / "__init__.py"
    path.touch()
    assert read_documents([path]) == [(str(path), "")]


@pytest.mark.parametrize("streaming", [False, True])
def test_tables(tmp_path, streaming):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    assert sorted(texts(path, streaming=streaming)) == ["first", "s\u00e9cond\nline"]


def write_table(path, rows, form):
    table = pyarrow.Table.from_pylist(rows)
    if form == "parquet":
        pyarrow.parquet.write_table(table, path)
        return
    new = pyarrow.ipc.new_file if form == "file" else pyarrow.ipc.new_stream
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.mark.parametrize(("form", "ending"), [("parquet", "parquet"), ("file", "arrow"), ("stream", "arrow")])
def test_a_table_is_the_file_of_that_name_as_it_is_now(tmp_path, form, ending):
    """A name is no pattern, and nothing is kept of a table that was there before, of the same size and time."""
    path, beside = tmp_path / f"e[1].{ending}", tmp_path / f"e1.{ending}"
    write_table(beside, [{"text": "beside"}], form)
    write_table(path, ROWS, form)
    assert texts(path) == ["first", "s\u00e9cond\nline"]
    before = path.stat()
    write_table(path, [row | {"text": row["text"].swapcase()} for row in ROWS], form)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert texts(path) == ["FIRST", "S\u00c9COND\nLINE"]
    with pytest.raises(ValueError, match=r"row 1, has no column 'body'; it has: 'text', 'other'\. Name the one"):
        texts(path, text_column="body")
    with pytest.raises(ValueError, match="row 1: column 'other' is not text but a int"):
        texts(path, text_column="other")


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


def test_what_datasets_keeps_of_its_own_work_is_no_data(tmp_path):
    """After `map` its result stands in the same folder, and after `filter` the numbers of rows."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": f"row {number}"} for number in range(3)]).save_to_disk(tmp_path / "kept")
    loaded = datasets.load_from_disk(tmp_path / "kept")
    loaded.map(lambda row: {"text": row["text"].upper()})
    loaded.filter(lambda row: row["text"] != "row 1")
    assert len(list((tmp_path / "kept").glob("cache-*.arrow"))) == 2
    with pytest.warns(UserWarning, match="2 of 5 files are what datasets keeps of its own work"):
        assert texts(tmp_path / "kept") == ["row 0", "row 1", "row 2"]


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


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "arrow", "dataset"])
def test_rows_whose_text_is_null_are_empty(tmp_path, monkeypatch, form):
    rows = [{"text": "first", "id": 1}, {"text": None, "id": 2}, {"text": "last", "id": 3}]
    path = tmp_path / f"a.{form}"
    if form in ("parquet", "arrow"):
        write_table(path, rows, form.replace("arrow", "file"))
    elif form == "dataset":
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: datasets.Dataset.from_list(rows))
        assert [text for _, text in open_source("me/data")] == ["first", "last"]
        return
    else:
        path.write_text(json.dumps(rows) if form == "json" else "\n".join(map(json.dumps, rows)))
    assert texts(path) == ["first", "last"]
    assert [text for _, text in read_documents([path])] == ["first", "last"]


def test_documents_that_are_given_one_by_one_are_kept():
    source = Source.of("some", ((f"{number}", "text") for number in range(3)))
    assert [[name for name, _ in source] for _ in range(2)] == [["0", "1", "2"]] * 2


def write(path, contents):
    path.write_bytes(contents)
    return str(path)


@pytest.mark.parametrize(
    ("name", "contents", "said"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n\t\n", "a.txt holds nothing but white space"),
        ("a.txt", b"\xff\x00\xfe\x01", "a.txt is not text in UTF-8: byte 0"),
        ("a.txt", b"\xff\xfea\0b", "a.txt is not text in UTF-16: byte 4"),
        ("a.bin", b"abc\0def", "a.bin is a binary file"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2, is not JSON"),
        ("a.jsonl", b'["text"]\n', "a.jsonl, line 1, is not a JSON object but a list"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', "line 1, has no column 'text'; it has: 'body', 'id'. Name the one"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: column 'text' is not text but a int"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl is not text in UTF-8"),
        ("a.jsonl", b'{"text": " "}\n', "a.jsonl has no text"),
        ("a.jsonl.gz", b"no gzip at all", "is not a complete gzip file"),
        ("a.jsonl.gz", gzip.compress(LINES.encode() * 99)[:-20], "is not a complete gzip file"),
        ("a.parquet", b"no table at all", "a.parquet cannot be read"),
        ("a.arrow", b"ARROW1 no table at all", "a.arrow cannot be read"),
        ("a.arrow", b"no stream at all", "a.arrow cannot be read"),
        ("a.txt.bz2", bz2.compress(b"text" * 999)[:-9], "is not a complete bzip2 file"),
        ("a.txt.bz2", b"no bzip2 at all", "is not a complete bzip2 file"),
        ("a.txt.xz", lzma.compress(b"text" * 999)[:-9], "is not a complete xz file"),
        ("a.json.zst", zstandard(LINES.encode())[:-9], "is not a complete zstandard file"),
        ("a.json", b'{"text": "a"}\n{"text": \n', "a.json is not JSON: Expecting value: line 3 column 1"),
        ("a.json", b'["text"]', "a.json, row 1, is not a JSON object but a str"),
        ("a.json", b'{"body": "a", "id": 1}', "row 1, has no column 'text'; it has: 'body', 'id'. Name the one"),
        ("a.json", b'{"a": [{"text": "a"}], "b": [{"text": "b"}]}', "row 1, has no column 'text'; it has: 'a', 'b'"),
        ("a.json", b"[]", "a.json has no text"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.jsonl", b'{"a":' * 100_000, "line 1, is not JSON that can be read: it is nested too deeply"),
        ("a.jsonl", b'{"text": "cut \\ud83d"}', "a.jsonl, line 1: character 5 is '\\ud83d', half of a character"),
        ("a.json", b'[{"text": "cut \\ud83d"}]', "a.json, row 1: character 5 is '\\ud83d', half of a character"),
        ("a.csv", b"id,body\n1,a\n", "line 2, has no column 'text'; it has: 'id', 'body'. Name the one"),
        ("a.csv", b"text,text\na,b\n", "a.csv, line 1, has the column 'text' twice; remove one of them"),
        ("a.jsonl", json.dumps(dict.fromkeys(map(str, range(999)))).encode(), "'18', '19' and 979 more. Name the one"),
        ("a.csv", b"id,text\n1,a,b\n", "a.csv, line 2, has 3 cells, but the header has 2 columns"),
        ("a.tsv", b"id\ttext\n1\n", "a.tsv, line 2, has 1 cells, but the header has 2 columns"),
        ("a.csv", b'text\n"a" b\n', "a.csv, line 2, cannot be read"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, name, contents, said):
    path = write(tmp_path / name, contents)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        list(open_sources([path])[0])
    assert "\n" not in str(caught.value)


def test_a_bad_row_behind_good_ones_is_named_before_any_work(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: column 'text' is not text but a int"):
        open_sources([path])


def test_a_binary_file_is_neither_measured_nor_started_from(tmp_path):
    with pytest.raises(ValueError, match=r"a\.bin is a binary file \(it holds zero bytes\); give a file with text"):
        read_documents([Path(write(tmp_path / "a.bin", b"abc\0def"))])


def test_an_empty_name_is_not_the_current_folder():
    with pytest.raises(ValueError, match="A text has an empty name; give a text file"):
        open_source("")


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


@pytest.fixture
def folder(tmp_path):
    """A folder of data with a link to another one."""
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "sub" / "b.txt").write_text("beta")
    (tmp_path / "data" / "a.txt").write_text("alpha")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.txt").write_text("gamma")
    (tmp_path / "data" / "link").symlink_to("../elsewhere", target_is_directory=True)
    return tmp_path / "data"


def test_links_to_folders_are_followed(folder):
    assert texts(folder) == ["alpha", "gamma", "beta"]


@pytest.mark.parametrize("target", ["..", ".", "../sub"])
def test_no_folder_is_read_twice(folder, target):
    (folder / "sub" / "z").symlink_to(target, target_is_directory=True)
    with pytest.warns(UserWarning, match=r"1 links lead to a folder that is already read, and are skipped: .*sub/z\."):
        assert texts(folder) == ["alpha", "gamma", "beta"]


def test_a_folder_that_cannot_be_entered_is_an_error(folder, monkeypatch):
    listdir = os.listdir

    def refusing(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refusing)
    with pytest.raises(PermissionError, match="sub"):
        open_source(str(folder))


def test_what_is_no_file_is_left_out_of_a_folder_by_name(folder):
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "gone.txt").symlink_to("nowhere")
    with pytest.warns(UserWarning, match=r"2 of 5 files are not text, and are skipped: .*gone.txt; .*pipe.jsonl\."):
        assert texts(folder) == ["alpha", "gamma", "beta"]


def test_settings_in_a_folder_are_left_out_by_name(folder):
    (folder / "package.json").write_text('{"name": "x"}')
    (folder / "tsconfig.json").write_text("{ // settings\n}")
    (folder / "d.json").write_text('[{"text": "delta"}]')
    with pytest.warns(
        UserWarning, match=r"2 of 6 files have no rows that can be read.*package.json, row 1, has no col"
    ):
        assert texts(folder) == ["alpha", "delta", "gamma", "beta"]
    (folder / "e.jsonl").write_text('{"name": "x"}')
    with (
        pytest.warns(UserWarning, match="2 of 7"),
        pytest.raises(ValueError, match=r"e\.jsonl, line 1, has no column 'text'"),
    ):
        texts(folder)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet", "a.json.gz"])
@pytest.mark.parametrize("read", [open_source, lambda name: read_documents([Path(name)])])
def test_what_is_no_file_is_named_and_never_opened(tmp_path, name, read):
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{name} is a pipe; give a text file"):
        read(str(path))
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"{name} is a broken link; give a text file"):
        read(str(path))
    path.unlink()
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.relpath(path))
        with pytest.raises(ValueError, match=f"{name} is a socket; give a text file"):
            read(str(path))
    path.unlink()
    path.symlink_to(os.devnull)
    with pytest.raises(ValueError, match=f"{name} is a device; give a text file"):
        read(str(path))


@pytest.mark.parametrize("place", ["out", "sub/out", ".", "sub/../out", "../elsewhere/out", "link/out"])
def test_an_output_among_the_data_is_refused(folder, place):
    with pytest.raises(ValueError, match=r"is inside .*data, which is read as data"):
        refuse_output_in_data(folder / place, ["a.txt", str(folder)])


@pytest.mark.parametrize("place", ["../out", ".hidden/out", "sub/.out", "../data2"])
def test_an_output_elsewhere_is_not(folder, place):
    refuse_output_in_data(folder / place, ["a.txt", str(folder), str(folder / "a.txt")])


def test_what_a_name_was_when_it_was_opened_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes").write_text("some text")
    rows = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows)
    sources = open_sources(["notes", "wikitext", "me/data:small"])
    Path("notes").unlink()
    assert [source.dataset for source in sources] == [None, "wikitext", "me/data"]


def test_a_name_that_is_not_utf8_can_be_written_everywhere(tmp_path):
    for folder in (os.fsencode(tmp_path / "f"), os.fsencode(tmp_path / "f") + b"\xe9"):
        os.mkdir(folder)
        with open(folder + b"/caf\xe9.txt", "w") as file:
            file.write("text")
        source = open_source(os.fsdecode(folder))
        ((name, text),) = source
        assert text == "text"
        assert name.endswith("/caf\\udce9.txt")
        assert (source.name + name).isascii()
        assert list(open_source(os.fsdecode(folder + b"/caf\xe9.txt"))) == [(name, text)]


def test_a_damaged_archive_is_always_said_to_be_one(tmp_path):
    """Every byte that can be damaged: whatever the library calls that, it is one kind of error here."""
    for ending, compress in COMPRESSED.items():
        if not ending:
            continue
        whole = compress(LINES.encode() * 3)
        path = tmp_path / f"a.jsonl{ending}"
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
            said = ""
            try:
                found = texts(path)
            except ValueError as error:
                said = str(error)
            if said:
                assert "\n" not in said
                assert str(path) in said
            else:  # such as the time in a header
                assert found == ["first", "s\u00e9cond\nline"] * 3 or ending == ".zst"


def test_a_dataset_that_breaks_off_is_named(monkeypatch):
    def rows():
        yield {"text": "first"}
        raise datasets.exceptions.DatasetGenerationError("a shard is damaged\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows())
    with pytest.raises(ValueError, match=r"^wikitext cannot be read: a shard is damaged$"):
        list(open_source("wikitext"))
