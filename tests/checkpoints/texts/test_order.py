"""The order in which streamed text comes: files and sources are mixed, and the seed shuffles them."""

import itertools
import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parscale.checkpoints.texts import order
from parscale.checkpoints.texts.order import FILES_AT_ONCE, in_turn, shuffled
from parscale.checkpoints.texts.sources import open_source

KINDS, ROWS = "abc", 40


@pytest.fixture
def folder(tmp_path):
    """Two files of each of three kinds; by name all of one kind come before the next."""
    for kind, number in itertools.product(KINDS, (1, 2)):
        rows = (json.dumps({"text": f"{kind}{number} {row}"}) for row in range(ROWS))
        (tmp_path / f"{kind}{number}.jsonl").write_text("\n".join(rows))
    return tmp_path


def texts(path, **options):
    return [text for _, text in open_source(str(path), **options)]


@pytest.mark.parametrize("window", [10_000, 5])
def test_a_streamed_folder_is_mixed(folder, window, monkeypatch):
    """Also where its files are far longer than what is read ahead."""
    monkeypatch.setattr(order, "SHUFFLE_BUFFER", window)
    in_order = texts(folder)
    found = {seed: texts(folder, streaming=True, seed=seed) for seed in (0, 1)}
    assert [text[0] for text in in_order] == sorted(text[0] for text in in_order)
    for mixed in found.values():
        assert sorted(mixed) == sorted(in_order)
        # a tenth of the text, of which a third is expected of each kind: 8, with a deviation of 2.1 at most
        assert min(Counter(text[0] for text in mixed[: len(mixed) // 10])[kind] for kind in KINDS) >= 2
    assert found[0] == texts(folder, streaming=True, seed=0)
    assert found[0] != found[1]


def test_more_files_than_are_open_at_once(tmp_path):
    """The seed says which of them come first."""
    for number in range(5 * FILES_AT_ONCE):
        (tmp_path / f"{number:02}.jsonl").write_text(f'{{"text": "{number}"}}\n' * 1000)
    first, second = (
        {text for _, text in itertools.islice(open_source(str(tmp_path), streaming=True, seed=seed), 100)}
        for seed in (0, 1)
    )
    assert len(first) == len(second) == 2 * FILES_AT_ONCE  # the window holds ten files
    assert first != second


def test_a_streamed_file_is_shuffled(folder):
    first, second = (texts(folder / "a1.jsonl", streaming=True, seed=seed) for seed in (0, 1))
    assert first != second != texts(folder / "a1.jsonl")
    assert sorted(first) == sorted(second) == sorted(texts(folder / "a1.jsonl"))


def test_sources_take_turns():
    assert list(in_turn([["a1", "a2", "a3"], [], ["b1"], ["c1", "c2"]])) == ["a1", "b1", "c1", "a2", "c2", "a3"]


@given(st.lists(st.integers(0, 6), max_size=9), st.integers(1, 4))
def test_as_many_are_open_as_may_be(lengths, at_once):
    opened, ended = [], []

    def source(number, length):
        opened.append(number)
        yield from ((number, place) for place in range(length))
        ended.append(number)

    found = []
    for document in in_turn((source(*each) for each in enumerate(lengths)), at_once):
        assert len(opened) - len(ended) <= at_once
        found.append(document)
    assert opened == [*range(len(lengths))]
    for number, length in enumerate(lengths):
        assert [place for other, place in found if other == number] == [*range(length)]
    assert len(found) == sum(lengths)


@given(st.integers(0, 60), st.integers(1, 9))
def test_a_window_moves_no_document_far_ahead(count, window):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(order, "SHUFFLE_BUFFER", window)
        found = list(shuffled(range(count), random.Random(count)))
    assert sorted(found) == [*range(count)]
    assert all(document < place + window for place, document in enumerate(found, 1))
