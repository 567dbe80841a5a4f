"""What a run reports of held-out text: the trained model against the untouched backbone, by place."""

import copy
import dataclasses
from statistics import fmean

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoTokenizer

from parscale import load, unwrap
from parscale.checkpoints.evaluation.paired_differences import first_documents, format_interval, verdict
from parscale.checkpoints.evaluation.places import evaluate_places
from parscale.checkpoints.texts.documents import Source
from parscale.checkpoints.training import held_out
from parscale.checkpoints.training.held_out import sentences, texts_to_measure
from parscale.checkpoints.training.run_folder import Run
from parscale.checkpoints.training.train import TrainSettings, train

S = 16
DOCUMENTS = [(f"{n}.py", f"def g{n}(y):\n    return y * {n}\n" * 4) for n in range(3)]


def settings(text_file, **options):
    texts = {"code": Source.of("code", DOCUMENTS), "line": Source.of("line", [("one", "import os")])}
    return TrainSettings(
        data=[str(text_file)],
        eval_data=texts,
        tokens=3 * 2 * S,
        sequence_length=S,
        batch_size=2,
        learning_rate=1e-2,
        streams_learning_rate=3e-2,
        bf16=False,
        eval_every=3,
        save_every=3,
        **options,
    )


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "everything"])
def test_the_trained_model_is_held_against_the_backbone_that_was_there_before(full, text_file, tmp_path, frozen):
    report = train(str(full), tmp_path / "run", settings(text_file, freeze_backbone=frozen))
    tokenizer = AutoTokenizer.from_pretrained(full)
    models = load(tmp_path / "run"), unwrap(load(full))
    places = [evaluate_places(model, tokenizer, DOCUMENTS, sequence_length=S) for model in models]
    losses = {
        where: [[document.loss for document in found[where].documents] for found in places]
        for where in ("beginning", "middle")
    }
    entries = {entry["where"]: entry for entry in report["comparisons"] if entry["text"] == "code"}
    assert entries.keys() == losses.keys()
    for where, (trained, untouched) in losses.items():
        entry, differences = entries[where], np.subtract(trained, untouched)
        assert entry["loss"] == pytest.approx(fmean(trained), rel=1e-4)
        assert entry["baseline_loss"] == pytest.approx(fmean(untouched), rel=1e-4)
        low, high = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
        assert (entry["low"], entry["high"]) == pytest.approx((low, high), abs=2e-4)
        assert (entry["documents"], entry["tokens"], entry["seeds"]) == (3, report["tokens"], 1)


def test_one_short_document_has_no_middle_and_no_interval(full, text_file, tmp_path):
    report = train(str(full), tmp_path / "run", settings(text_file, freeze_backbone=True))
    (entry,) = [entry for entry in report["comparisons"] if entry["text"] == "line"]
    assert (entry["where"], entry["documents"], entry["low"], entry["high"]) == ("beginning", 1, None, None)
    assert "one document: no interval" in format_interval(entry)
    found = sentences(report["comparisons"])
    assert [sentence.startswith("In the middle of code, against the untouched backbone: ") for sentence in found] == [
        True,
        False,
    ]
    assert found[1] == "No document of line is long enough for a middle, where a gain has to show."
    card = (tmp_path / "run" / "README.md").read_text()
    assert "A lower loss than the untouched backbone's is not yet a gain of streams." in card


def test_without_held_out_text_nothing_is_compared(full, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "measure_places", None)
    wanted = settings(text_file, freeze_backbone=True)
    without = TrainSettings(**{**vars(wanted), "eval_data": {}})
    assert train(str(full), tmp_path / "run", without)["comparisons"] == []


def test_the_model_is_there_whatever_becomes_of_the_comparison(full, text_file, tmp_path, monkeypatch):
    """Interrupted, it is made up for; where it fails, as for lack of memory, the run ends without it."""
    folder, wanted = tmp_path / "run", settings(text_file, freeze_backbone=True)

    def run_until(error, **options):
        monkeypatch.setattr(held_out, "measure_places", lambda *args: (_ for _ in ()).throw(error))
        return train(str(full), folder, wanted, **options)

    with pytest.raises(KeyboardInterrupt):
        run_until(KeyboardInterrupt())
    assert load(folder).num_streams == 3
    assert AutoTokenizer.from_pretrained(folder)("x")["input_ids"]
    assert "Not measured." not in (folder / "README.md").read_text()
    assert Run(folder).report() is None
    said = r"trained model is in .*run, but was not compared with the untouched backbone \(too large\);.* --resume"
    with pytest.warns(UserWarning, match=said):
        report = run_until(torch.OutOfMemoryError("too large"), resume=True)
    assert (report["comparisons"], report["finished_before"]) == ([], False)
    assert run_until(AssertionError(), resume=True)["finished_before"]


def test_rows_that_are_measured_at_the_end_alone_are_read_before_the_first_step(full, text_file, tmp_path):
    """A letter is two tokens in packed text, which ends it here after 64 documents, and one where it is measured."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "x"}\n' * 90 + '{"text": 3}\n')
    wanted = dataclasses.replace(settings(text_file), eval_data={"rows": str(rows)}, eval_tokens=100)
    with pytest.raises(ValueError, match="line 91: column 'text' is not text but a int"):
        train(str(full), tmp_path / "run", wanted)
    assert not (tmp_path / "run").exists()


def test_documents_are_taken_until_there_are_enough_tokens(byte_tokenizer):
    documents = [(str(n), "x" * 50) for n in range(9)]
    assert [name for name, _ in first_documents(documents, byte_tokenizer, 16, 120)] == ["0", "1", "2"]
    assert [name for name, _ in first_documents(documents, byte_tokenizer, 4, 41)] == ["0", "1", "2"]  # 5 windows of 4


def test_a_text_without_a_token_to_score_is_left_out(byte_tokenizer):
    def texts(tokenizer):
        sources = {name: Source.of(name, [("one", text)]) for name, text in (("letter", "x"), ("word", "import"))}
        return list(texts_to_measure(sources, tokenizer, 16, 100))

    assert texts(byte_tokenizer) == ["letter", "word"]  # the end-of-text token stands in front of the letter
    nothing_in_front = copy.deepcopy(byte_tokenizer)
    nothing_in_front.eos_token = None
    assert texts(nothing_in_front) == ["word"]


@pytest.mark.parametrize(
    ("highs", "said"),
    [
        ((-0.1, -0.2), "ahead of each control with this seed; a gain needs several seeds"),
        ((-0.1, 0.2), "no gain"),
        ((-0.1, None), "one document decides nothing"),
    ],
)
def test_one_seed_never_proves_a_gain(highs, said):
    assert verdict([{"high": high} for high in highs]) == said
