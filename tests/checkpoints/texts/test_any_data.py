"""Whatever a data file holds, it is read as texts, or refused at once in one line that names it."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from datetime import timedelta

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parscale.checkpoints.texts.rows import ENDINGS, TABLES
from parscale.checkpoints.texts.sources import open_sources

ROWS = [{"text": "first", "id": 1}, {"text": "s\u00e9cond\n", "id": 2}, {"text": "\U0001f600", "id": 3}]
COMPRESSED = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda contents: pyarrow.compress(contents, codec="zstd", asbytes=True),
}
ANYTHING = settings(
    max_examples=120, deadline=timedelta(seconds=5), suppress_health_check=list(HealthCheck), derandomize=True
)


def valid(ending):
    """Rows as a file of this kind holds them."""
    file = io.BytesIO()
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    elif ending == ".arrow":
        table = pyarrow.Table.from_pylist(ROWS)
        with pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    elif ending in (".csv", ".tsv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, ["text", "id"], delimiter="," if ending == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(ROWS)
        return text.getvalue().encode()
    elif ending == ".json":
        return json.dumps({"data": ROWS}, indent=1).encode()
    else:
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
    return file.getvalue()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


def outcome(folder, name, contents):
    """The texts, or the error."""
    path = folder / name
    path.write_bytes(contents)
    texts, said = [], str(path)
    try:
        texts = [text for _, text in open_sources([str(path)])[0]]
    except ValueError as error:
        said = str(error)
    left, now = os.listdir(folder), path.read_bytes()
    path.unlink()
    assert "\n" not in said
    assert str(path) in said
    for text in texts:
        text.encode("utf-8")  # what every tokenizer reads
        assert text.strip()
    assert left == [name]
    assert now == contents
    return texts


@pytest.mark.parametrize("ending", [*ENDINGS, ".txt"])
@ANYTHING
@given(st.data())
def test_any_damage(scratch, ending, data):
    """Bytes changed, left out or put in, inside a compression and outside."""
    compression = data.draw(st.sampled_from([*COMPRESSED]))
    contents = damaged(data, valid(ending))
    contents = damaged(data, COMPRESSED[compression](contents))
    outcome(scratch, f"a{ending}{compression}", contents)


def damaged(data, contents):
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(contents)))
        left_out = data.draw(st.sampled_from([0, 0, 1, 2, len(contents)]))
        put_in = data.draw(st.one_of(st.binary(max_size=4), st.sampled_from(PIECES)))
        contents = contents[:at] + put_in + contents[at + left_out :]
    return contents


PIECES = [b'"', b"\\ud83d", b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b",", b"\r"]


@ANYTHING
@given(st.sampled_from([*ENDINGS, ".txt", ".gz", ".bz2", ".xz", ".zst"]), st.binary(max_size=64))
def test_any_bytes(scratch, ending, contents):
    outcome(scratch, f"a{ending}", contents)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(categories=None), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "data", "x"]), inner),
    max_leaves=8,
)


@ANYTHING
@given(JSON, st.sampled_from([None, 1]))
def test_any_json(scratch, value, indent):
    """Nothing is read but what stands under the column's name, in the order in which it stands."""
    texts = outcome(scratch, "a.json", json.dumps(value, indent=indent).encode())
    found = iter(under(value, "text"))
    assert all(any(text == other for other in found) for text in texts)


def under(value, name):
    if isinstance(value, list):
        return [text for item in value for text in under(item, name)]
    if not isinstance(value, dict):
        return []
    return [text for key, item in value.items() for text in ([item] if key == name else under(item, name))]


def test_any_changed_byte_of_a_table_ends_no_process(programs, tmp_path):
    """In a process of its own: what is damaged in a table of Arrow is an address for its library."""
    program = """
import sys
from pathlib import Path
from parscale.checkpoints.texts.rows import texts_of_rows
for path in map(Path, sys.argv[1:]):
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            list(texts_of_rows(path, "text"))
        except ValueError as error:
            assert str(path) in str(error)
"""
    paths = [tmp_path / f"a{ending}" for ending in TABLES]
    for path in paths:
        path.write_bytes(valid(path.suffix))
    ended = programs.run("-P", "-c", program, *paths, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
