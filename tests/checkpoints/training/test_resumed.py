"""What may be another when a run is resumed, and what it is told that cannot be resumed."""

import json
import re

import pytest

from parscale import load
from parscale.checkpoints.texts import order
from parscale.checkpoints.training import digests
from parscale.checkpoints.training.run_folder import Run
from parscale.checkpoints.training.train import TrainSettings, train

S, BATCH = 16, 2
OPTIONS = {"sequence_length": S, "batch_size": BATCH, "freeze_backbone": True, "bf16": False}


def stopped_after(publish):
    """Stops a run after its first checkpoint."""

    def stopped(self, written, step, **others):
        publish(self, written, step, **others)
        raise KeyboardInterrupt

    return stopped


def test_how_often_is_saved_and_measured(streams_only, text_file, tmp_path, monkeypatch):
    """A checkpoint of the Trainer holds what was given before."""
    folder = tmp_path / "run"
    options = OPTIONS | {"data": [str(text_file)], "eval_data": {"same": str(text_file)}, "eval_tokens": S}
    options |= {"tokens": 5 * BATCH * S, "keep_checkpoints": 9}
    with monkeypatch.context() as patched:
        patched.setattr(Run, "publish", stopped_after(Run.publish))
        with pytest.raises(KeyboardInterrupt):
            train(str(streams_only), folder, TrainSettings(**options, save_every=2, eval_every=5))
    train(str(streams_only), folder, TrainSettings(**options, save_every=1, eval_every=2), resume=True)
    assert sorted(Run(folder).steps()) == [2, 3, 4, 5]
    measured = [line["step"] for line in Run(folder).metrics() if "eval_loss" in line]
    assert measured == [0, 4, 5]


def test_names_of_the_same_contents(tmp_path, monkeypatch):
    """Of streamed data a part is compared by its contents, so its names count."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    (tmp_path / "here" / "text.txt").write_text("text")
    (tmp_path / "here" / "model").mkdir()
    names = {"checkpoint": "model", "data": ["text.txt", "org/data"], "eval_data": {"code": "text.txt"}}
    digests = {"checkpoint_digest": "1", "data_digest": "2", "eval_digests": {"code": "3"}}
    for streaming in (False, True):
        settings = names | digests | {"streaming": streaming}
        monkeypatch.chdir(tmp_path / "here")
        run = Run(tmp_path / f"run-{streaming}")
        run.begin(settings, resume=False)
        run.release()
        here = tmp_path / "here"
        written = {
            "checkpoint": str(here / "model"),
            "data": [str(here / "text.txt"), "org/data"],
            "eval_data": {"code": str(here / "text.txt")},
        }
        assert json.loads((run.folder / "run.json").read_text()).items() >= written.items()
        monkeypatch.chdir(tmp_path / "there")
        run.require_same(settings | written)
        run.require_same(settings | written | {"checkpoint": "a copy", "eval_data": {"code": "copy.txt"}})
        other = settings | written | {"data": ["copy.txt", "org/data"]}
        if streaming:
            with pytest.raises(ValueError, match="other settings: data was"):
                run.require_same(other)
        else:
            run.require_same(other)
        with pytest.raises(ValueError, match=r"other settings: checkpoint was .* is 'other'; checkpoint_digest was"):
            run.require_same(settings | written | {"checkpoint": "other", "checkpoint_digest": "4"})


def test_streamed_data_that_cannot_be_read_to_its_end(streams_only, text_file, tmp_path, monkeypatch):
    """The checkpoint that is named can be trained in its place."""
    monkeypatch.setattr(order, "SHUFFLE_BUFFER", 2)  # of what is read ahead an error is said before training
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "def f(x): return x"}\n' * 69 + '{"text": 3}\n')  # read 64 at a time
    options = OPTIONS | {"tokens": 4000, "sequence_length": 64, "save_every": 4}
    chosen = TrainSettings(data=[str(rows)], streaming=True, **options)
    said = r"line 70: column 'text' is not text but a int\. With the same data --resume goes on; after a correction, "
    with pytest.raises(ValueError, match=rf"{said}start in a new folder, from \S+checkpoint-\d+\.$") as caught:
        train(str(streams_only), tmp_path / "run", chosen)
    newest = re.search(r"from (\S+)\.$", str(caught.value))[1]
    assert newest == str(Run(tmp_path / "run").newest_checkpoint())
    train(newest, tmp_path / "more", TrainSettings(data=[str(text_file)], **OPTIONS, tokens=BATCH * S))
    assert load(tmp_path / "more").num_streams == 3


def test_streamed_files_go_on_where_they_were(streams_only, tmp_path, monkeypatch):
    """They are read again from the beginning, in the same order; an order of another kind is refused."""
    for number in range(6):
        rows = "".join(json.dumps({"text": f"def f{number}(x): return x * {row}"}) + "\n" for row in range(9))
        (tmp_path / f"{number}.jsonl").write_text(rows)
    named = [str(tmp_path / f"{number}.jsonl") for number in range(6)]
    chosen = TrainSettings(data=named, streaming=True, **OPTIONS, tokens=5 * BATCH * S, save_every=2)
    train(str(streams_only), tmp_path / "whole", chosen)
    with monkeypatch.context() as patched:
        patched.setattr(Run, "publish", stopped_after(Run.publish))
        with pytest.raises(KeyboardInterrupt):
            train(str(streams_only), tmp_path / "run", chosen)
    for name in ("SHUFFLE_BUFFER", "SHUFFLE_CHARACTERS"):
        with monkeypatch.context() as patched:
            patched.setattr(digests, name, 20_000)
            with pytest.raises(ValueError, match="data_digest was"):
                train(str(streams_only), tmp_path / "run", chosen, resume=True)
    train(str(streams_only), tmp_path / "run", chosen, resume=True)
    losses = [[line["loss"] for line in Run(tmp_path / name).metrics()] for name in ("run", "whole")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5


def test_a_file_that_is_gone_by_the_name_that_it_had(tmp_path, monkeypatch):
    """Relative to the folder that the run was started in."""
    monkeypatch.chdir(tmp_path)
    names = {"data": ["text.txt", "org/data"], "eval_data": {"code": "text.txt"}, "trains": "streams"}
    (tmp_path / "text.txt").write_text("text")
    run = Run(tmp_path / "run")
    run.begin(names, resume=False)
    run.release()
    (tmp_path / "text.txt").unlink()
    run.require_same(names)
    for changed in ({"data": ["other.txt", "org/data"]}, {"data": ["text.txt"]}, {"eval_data": {"code": "other.txt"}}):
        with pytest.raises(ValueError, match="was started with other settings"):
            run.require_same(names | changed)
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(ValueError, match="was started with other settings"):
        run.require_same(names)


@pytest.mark.parametrize("contents", ['{"a', "[]"])
def test_a_damaged_report_is_named(tmp_path, contents):
    (tmp_path / "training.json").write_text(contents)
    with pytest.raises(ValueError, match=r"training\.json .*damaged.*; remove it, and --resume writes it again\."):
        Run(tmp_path).report()
