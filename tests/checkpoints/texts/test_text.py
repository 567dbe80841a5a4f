"""The text at hand: which files it is, how it is split, and how it is packed."""

import hashlib

import numpy as np
import pytest

from parscale.checkpoints.texts.python_source import (
    is_held_out,
    package_source_split,
    standard_library_files,
    standard_library_split,
)
from parscale.checkpoints.training.packing import pack_documents


@pytest.fixture(scope="module")
def documents():
    return standard_library_split()


@pytest.fixture
def tokenizer(byte_tokenizer):
    return byte_tokenizer


def test_files_are_hand_written_library_source():
    paths = standard_library_files()
    names = [path.as_posix() for path in paths]
    assert any(name.endswith("/argparse.py") for name in names)
    assert any(name.endswith("/json/decoder.py") for name in names)
    assert len(names) > 300
    assert not any("-packages/" in name or "/test/" in name or "/encodings/" in name for name in names)
    assert not any("_sysconfigdata" in name or "/config-" in name or name.endswith("/topics.py") for name in names)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fnmatch.py", True),
        ("statistics.py", True),
        ("turtle.py", True),
        ("asyncio/threads.py", True),
        ("unittest/mock.py", True),
        ("argparse.py", False),
        ("dataclasses.py", False),
        ("json/decoder.py", False),
    ],
)
def test_side_of_a_file_is_fixed_by_its_name(name, expected):
    assert is_held_out(name) is expected


def test_one_name_in_twenty_is_held_out():
    assert 80 < sum(is_held_out(f"package/module_{i}.py") for i in range(2000)) < 120


def test_split_is_deterministic_disjoint_and_sorted(documents):
    train, held_out = documents
    assert standard_library_split() == documents
    for side, expected in ((train, False), (held_out, True)):
        names = [name for name, _ in side]
        assert names == sorted(names)
        assert len(names) == len(set(names))
        assert {is_held_out(name) for name in names} == {expected}
    assert {name for name, _ in train}.isdisjoint(name for name, _ in held_out)
    assert 0.03 < len(held_out) / (len(train) + len(held_out)) < 0.08


def test_no_text_is_empty_or_appears_twice(documents):
    texts = [text for side in documents for _, text in side]
    assert len(texts) == len(set(texts))
    assert all(text.strip() for text in texts)


@pytest.mark.parametrize("sequence_length", [1, 7, 64, 512])
def test_packing_keeps_every_token_once_in_order(documents, tokenizer, sequence_length):
    some = documents[1][:5]
    expected = [
        token for _, text in some for token in (*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id)
    ]
    ids = pack_documents(some, tokenizer, sequence_length).ids
    assert ids.shape == (len(expected) // sequence_length, sequence_length)
    np.testing.assert_array_equal(ids.ravel(), expected[: ids.size])
    assert len(expected) - ids.size < sequence_length


def test_packing_ends_each_document_with_the_end_of_text(tokenizer):
    blocks = pack_documents([("a", "abc"), ("b", ""), ("c", "de")], tokenizer, 4)
    assert tokenizer.convert_ids_to_tokens(blocks.ids.ravel().tolist()) == [
        "a",
        "b",
        "c",
        "<end>",
        "<end>",
        "d",
        "e",
        "<end>",
    ]


def test_packing_less_than_a_block_gives_none(tokenizer):
    assert pack_documents([("a", "abc")], tokenizer, 5).ids.shape == (0, 5)
    assert pack_documents([], tokenizer, 5).ids.shape == (0, 5)


@pytest.mark.parametrize("sequence_length", [0, -1])
def test_packing_refuses_a_length_below_one(tokenizer, sequence_length):
    with pytest.raises(ValueError, match="at least 1"):
        pack_documents([("a", "abc")], tokenizer, sequence_length)


def test_test_suites_join_the_training_side_only(documents):
    train, held_out = documents
    with_tests, held_out_again = standard_library_split(with_tests=True)
    assert held_out_again == held_out
    assert with_tests[: len(train)] == train
    further = {name for name, _ in with_tests[len(train) :]}
    suites = {path.as_posix() for path in standard_library_files(tests=True)}
    assert all(any(path.endswith(name) for path in suites) for name in further)
    assert all({"test", "tests", "idle_test"} & set(name.split("/")) for name in further)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages to import, `first_one` and `second_one`, with files that are wanted and others."""
    files = {
        "first_one/__init__.py": "",
        "first_one/b.py": "b = 1\n",
        "first_one/a.py": "a = 1\n",
        "first_one/again.py": "a = 1\n",
        "first_one/deep/er/c.py": "c = 1\n",
        "first_one/tests/test_a.py": "assert True\n",
        "first_one/deep/test/data.py": "d = 1\n",
        "first_one/table.py": "x = 1\n" * 50_000,
        "first_one/notes.txt": "no source\n",
        "first_one/latin.py": "# coding: ascii\n# \u00e9\n",
        "second_one/__init__.py": "",
        "second_one/z.py": "z = 1\n",
        "lone_file.py": "y = 1\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("packages")
def test_source_of_packages():
    train, held_out = package_source_split(["second_one", "first_one"])
    wanted = {"second_one/z.py": "z = 1\n", "first_one/a.py": "a = 1\n", "first_one/b.py": "b = 1\n"}
    assert dict(train + held_out) == wanted | {"first_one/deep/er/c.py": "c = 1\n"}
    assert train[0][0] == "second_one/z.py"  # in the order of the packages


def test_held_out_source_of_packages_chose_no_learning_rate():
    """The study of controls chose by files whose names' hashes end in 0 to 4."""
    train, held_out = package_source_split(["numpy", "scipy"])
    assert 0.03 < len(held_out) / (len(train) + len(held_out)) < 0.08
    for name, _ in held_out:
        assert int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) % 100 >= 95
    assert all(int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) % 100 < 95 for name, _ in train)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", ["not_there", "lone_file", "sys"])
def test_a_package_without_source(name):
    with pytest.raises(ValueError, match=f"There is no installed package {name} with source; install it"):
        package_source_split(["first_one", name])
