"""The order in which streamed text comes: files and sources are mixed, and the seed shuffles them."""

import itertools
import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parscale.checkpoints.texts import order, sources
from parscale.checkpoints.texts.documents import Chat, Completion, Source
from parscale.checkpoints.texts.order import FILES_AT_ONCE, in_turn, shuffled
from parscale.checkpoints.texts.sources import open_source, open_sources

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
    documents = [(number, "text") for number in range(count)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(order, "SHUFFLE_BUFFER", window)
        found = list(shuffled(documents, random.Random(count)))
    assert sorted(found) == documents
    assert all(number < place + window for place, (number, _) in enumerate(found, 1))


@given(st.lists(st.integers(0, 30), max_size=30), st.integers(1, 60))
def test_a_window_holds_so_many_characters(lengths, limit):
    """A document that is longer is held alone."""
    kinds = (
        lambda text: text,
        lambda text: Completion(text[:3], text[3:]),
        lambda text: Chat([text[:3], text[3:]]),
    )
    documents = [(number, kinds[number % 3]("x" * length)) for number, length in enumerate(lengths)]
    read, given_out = [], []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(order, "SHUFFLE_CHARACTERS", limit)
        for number, _ in shuffled((read.append(each[0]) or each for each in documents), random.Random(0)):
            given_out.append(number)
            held = set(read[:-1]) - set(given_out)  # the last one read comes in once there is room
            assert sum(lengths[each] for each in held) <= max(limit, max((lengths[each] for each in held), default=0))
    assert sorted(given_out) == [*range(len(lengths))]


def test_a_window_of_short_documents_is_full():
    """The limit of characters is far above them."""
    read = itertools.count()
    documents = ((f"{next(read)}", "x" * 1000) for _ in range(30_000))
    next(shuffled(documents, random.Random(0)))
    assert next(read) == order.SHUFFLE_BUFFER + 1


def test_files_by_name_are_shuffled_as_one(tmp_path, monkeypatch):
    """Few are open at once, one window holds documents of all, and each is checked beforehand."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "f.jsonl").write_text('{"text": "f"}\n')
    names = [tmp_path / f"{number:02}.jsonl" for number in range(5 * FILES_AT_ONCE)]
    for number, path in enumerate(names):
        path.write_text(f'{{"text": "{number}"}}\n' * 100)
    opened, ended, read = [], [], sources._file

    def counted(path, *args, **options):
        opened.append(path)
        yield from read(path, *args, **options)
        ended.append(path)

    given_in_memory = Source.of("memory", [("m", "m")])
    mixed = open_sources([given_in_memory, *names[:3], tmp_path / "folder", *names[3:]], streaming=True)
    assert [source.name for source in mixed] == ["memory", "40 files", str(tmp_path / "folder")]
    monkeypatch.setattr(sources, "_file", counted)
    monkeypatch.setattr(order, "SHUFFLE_BUFFER", 1000)
    found = []
    for _, text in mixed[1]:
        assert len(opened) - len(ended) <= FILES_AT_ONCE
        found.append(text)
    assert Counter(found) == {str(number): 100 for number in range(len(names))}
    assert len(set(found[:100])) > FILES_AT_ONCE
    names[-1].write_text('{"text": 3}')
    with pytest.raises(ValueError, match=r"39\.jsonl"):
        open_sources(names, streaming=True)


def test_a_check_of_streamed_data_reads_a_few_files(tmp_path, monkeypatch):
    for number in range(50):
        (tmp_path / f"{number:02}.txt").write_text("text")
    read, real = [], sources.read_text
    monkeypatch.setattr(sources, "read_text", lambda path: read.append(path.name) or real(path))
    (source,) = open_sources([tmp_path], streaming=True)
    list(source.beginning(sources.LOOKED_AT))
    assert read == [f"{number:02}.txt" for number in range(sources.LOOKED_AT)] * 2
