"""What `parscale train` makes of the names of its data, from the first look to the model card."""

import json
import os

import pytest

from parscale.cli.application import BAD_INPUT, run

SIZES = ["--tokens", "0.128K", "--sequence-length", "16", "--batch-size", "4", "--eval-tokens", "64"]
SIZES += ["--freeze-backbone"]


def test_a_name_that_is_not_utf8_stays_readable_to_the_card(two_sets, text_file, tmp_path, monkeypatch):
    data = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.py")
    os.rename(text_file, data)
    output = tmp_path / "run"
    arguments = ["train", str(two_sets), "--data", data, "--eval-data", data, "--output", str(output), *SIZES]
    monkeypatch.setattr("sys.argv", ["parscale", *arguments])
    assert run(arguments) == 0
    assert "caf\\udce9.py" in (output / "README.md").read_text(encoding="utf-8")
    for name in ("run.json", "training.json"):
        written = json.loads((output / name).read_text(encoding="utf-8"))
        assert written["data"] == [*written["eval_data"].values()] == [f"{tmp_path}/caf\\udce9.py"]
        json.dumps(written, ensure_ascii=False).encode()  # as every other reader of JSON takes it
    (output / "training.json").unlink()
    assert run([*arguments, "--resume"]) == 0


def test_a_file_that_has_gone_meanwhile_is_no_dataset(two_sets, text_file, tmp_path, monkeypatch):
    from parscale.checkpoints.training.trainer import StreamsTrainer

    monkeypatch.chdir(tmp_path)
    text_file.rename("notes")
    train = StreamsTrainer.train

    def removing(self, **options):
        os.unlink("notes")
        return train(self, **options)

    monkeypatch.setattr(StreamsTrainer, "train", removing)
    assert run(["train", str(two_sets), "--data", "notes", "--output", "run", *SIZES]) == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert "datasets:" not in card
    assert "`notes`" in card


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_an_output_among_the_data_is_refused(two_sets, text_file, tmp_path, capsys, resume):
    arguments = ["train", str(two_sets), "--data", str(tmp_path), "--output", str(tmp_path / "run"), *SIZES]
    assert run([*arguments, *resume]) == BAD_INPUT
    printed = capsys.readouterr()
    assert f"The output {tmp_path}/run is inside {tmp_path}, which is read as data" in printed.err
    assert printed.err.count("\n") == 1
    assert os.listdir(tmp_path) == [text_file.name]
