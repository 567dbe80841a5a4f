"""The quickstart at a tiny scale: what it trains, compares, prints and leaves behind."""

import dataclasses
import io
import json
import math

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from parscale import load
from parscale.checkpoints.evaluation.text_loss import evaluate
from parscale.checkpoints.quickstart import run as quickstart
from parscale.checkpoints.quickstart.report import sentences
from parscale.checkpoints.quickstart.run import CODE, PROSE, QuickstartSettings, QuickstartTexts, run_quickstart

SETTINGS = QuickstartSettings(
    num_streams=3,
    prefix_length=5,
    tokens=6 * 4 * 16,
    sequence_length=16,
    window=32,
    new_tokens=6,
)
TEXTS = QuickstartTexts(
    train=[(f"train{n}.py", f"def f{n}(x):\n    return x + {n}\n" * 5) for n in range(12)],
    measured={
        CODE: [(f"{n}.py", f"def g{n}(y):\n    return y * {n}\n") for n in range(5)],
        PROSE: [(f"topic{n}", f"The {n}th sentence is about nothing.") for n in range(4)],
    },
)


@pytest.fixture(scope="module")
def backbone(byte_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "backbone"
    byte_tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(byte_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=byte_tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(backbone, tmp_path_factory):
    """One run: its folder, its report and what it printed."""
    output = tmp_path_factory.mktemp("quickstart") / "output"
    printed = io.StringIO()
    console = Console(file=printed, width=80)
    report = run_quickstart(output, seed=3, settings=SETTINGS, model_path=backbone, texts=TEXTS, console=console)
    return output, report, printed.getvalue()


def test_leaves_two_models_the_report_and_the_plot(finished):
    output, report, _ = finished
    assert sorted(path.name for path in output.iterdir()) == ["everything", "frozen", "report.json", "report.png"]
    assert json.loads((output / "report.json").read_text()) == report
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in output.parent.iterdir()) == ["output"]


@pytest.mark.parametrize("name", ["frozen", "everything"])
def test_losses_are_those_of_the_saved_models(finished, name):
    output, report, _ = finished
    model, tokenizer = load(output / name), AutoTokenizer.from_pretrained(output / name)
    assert model.num_streams == 3
    for kind, documents in TEXTS.measured.items():
        measured = evaluate(model, tokenizer, documents, sequence_length=32)
        mean = sum(document.loss for document in measured.documents) / len(documents)
        assert report["models"][name]["loss"][kind] == pytest.approx(mean, abs=1e-6)


def test_only_the_streams_of_the_frozen_row_have_moved(finished, backbone):
    output, report, _ = finished
    before = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32).state_dict()
    frozen, everything = load(output / "frozen").state_dict(), load(output / "everything").state_dict()
    assert all(torch.equal(frozen[name], tensor) for name, tensor in before.items())
    assert not any(torch.equal(everything[name], tensor) for name, tensor in before.items())
    streams = {name: tensor for name, tensor in frozen.items() if name not in before}
    assert report["models"]["frozen"]["trained_parameters"] == sum(tensor.numel() for tensor in streams.values())
    assert report["models"]["alone"]["trained_parameters"] == sum(
        tensor.numel() for name, tensor in before.items() if name != "lm_head.weight"
    )


def test_rows_train_on_the_same_number_of_tokens(finished):
    _, report, _ = finished
    tokens = {name: figures["trained_tokens"] for name, figures in report["models"].items()}
    assert tokens == {
        "untouched": 0,
        "frozen": SETTINGS.tokens,
        "everything": SETTINGS.tokens,
        "alone": SETTINGS.tokens,
    }


def test_a_slow_machine_trains_all_rows_on_fewer_tokens(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "seconds_of_step", lambda *args, **options: 25.0)
    settings = dataclasses.replace(SETTINGS, seconds=80.0)
    report = run_quickstart(
        tmp_path / "output",
        settings=settings,
        model_path=backbone,
        texts=TEXTS,
        console=Console(file=io.StringIO()),
    )
    tokens = {name: figures["trained_tokens"] for name, figures in report["models"].items()}
    assert tokens == {"untouched": 0, "frozen": 3 * 4 * 16, "everything": 3 * 4 * 16, "alone": 3 * 4 * 16}


def test_where_there_is_no_terminal_progress_is_printed(finished):
    _, _, printed = finished
    assert printed.count("step 3 of 6  loss ") == 3


def test_comparisons_pair_the_losses_by_document(finished, backbone):
    output, report, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    losses = [
        [document.loss for document in evaluate(model, tokenizer, TEXTS.measured[CODE], sequence_length=32).documents]
        for model in (
            load(output / "everything"),
            AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32),
        )
    ]
    differences = [new - old for new, old in zip(*losses, strict=True)]
    (entry,) = [
        entry
        for entry in report["comparisons"]
        if (entry["model"], entry["baseline"], entry["text"]) == ("everything", "untouched", CODE)
    ]
    mean = sum(differences) / 5
    error = math.sqrt(sum((difference - mean) ** 2 for difference in differences) / 4 / 5)
    assert entry["difference"] == pytest.approx(mean, abs=1e-6)
    assert entry["high"] - entry["difference"] == pytest.approx(2.776445 * error, rel=1e-4)  # t table: 4 degrees, 95 %
    assert entry["improved"] == sum(difference < 0 for difference in differences)


def test_the_table_and_the_sentences_say_what_the_report_says(finished):
    _, report, printed = finished
    for figures in report["models"].values():
        assert figures["title"] in printed
        assert all(f"{loss:.4f}" in printed for loss in figures["loss"].values())
        assert f"{figures['trained_parameters']:,}" in printed
        assert figures["written"].splitlines()[0] in printed
    for entry in report["comparisons"]:
        if entry["baseline"] == "untouched":
            assert f"{entry['difference']:+.4f} ({entry['low']:+.4f}, {entry['high']:+.4f})" in printed
    assert " ".join(sentences(report)[0].split()) in " ".join(printed.split())


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-0.3, -0.1, "CODE: a gain of 0.2000, better on 3 of 5 documents"),
        (0.1, 0.3, "CODE: no gain: worse by 0.2000, better on 3 of 5 documents"),
        (-0.1, 0.3, "CODE: no gain: +0.1000 is within chance, better on 3 of 5 documents"),
    ],
)
def test_sentences_claim_a_gain_only_when_the_interval_shows_one(low, high, words):
    entry = {"model": "a", "baseline": "b", "text": "CODE", "documents": 5, "improved": 3}
    report = {
        "models": {"a": {"title": "this"}, "b": {"title": "that"}},
        "comparisons": [entry | {"difference": (low + high) / 2, "low": low, "high": high}],
    }
    assert sentences(report) == [f"this, against that: {words}."]


def test_the_same_seed_gives_the_same_figures(finished, backbone, tmp_path):
    _, report, _ = finished
    again = run_quickstart(
        tmp_path / "again",
        seed=3,
        settings=SETTINGS,
        model_path=backbone,
        texts=TEXTS,
        console=Console(file=io.StringIO()),
    )
    assert [figures["loss"] for figures in again["models"].values()] == [
        figures["loss"] for figures in report["models"].values()
    ]


def test_an_interruption_leaves_nothing(backbone, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        assert any(tmp_path.iterdir())  # the first model has been saved by now
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "plot", interrupt)
    small = dataclasses.replace(SETTINGS, tokens=64)
    with pytest.raises(KeyboardInterrupt):
        run_quickstart(
            tmp_path / "output",
            settings=small,
            model_path=backbone,
            texts=TEXTS,
            console=Console(file=io.StringIO()),
        )
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_holds_something_is_refused_before_any_work(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; give a new one, or empty it"):
        run_quickstart(tmp_path, model_path=tmp_path / "missing")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_standard_texts_are_cut_and_disjoint():
    texts = quickstart.quickstart_texts(100, 100)
    trained = {name for name, _ in texts.train}
    assert not trained & {name for name, _ in texts.measured[CODE]}
    assert len(texts.measured[CODE]) > 20
    assert len(texts.measured[PROSE]) > 50
    assert all(0 < len(text) <= 100 for documents in texts.measured.values() for _, text in documents)
