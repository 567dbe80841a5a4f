"""Where a run reports to: a tracker that is there has its losses, and one that is not is refused before it begins."""

import json

import pytest

from parscale.checkpoints.training.trackers import check_trackers
from parscale.checkpoints.training.train import TrainSettings, train


def test_tensorboard_has_the_losses_of_the_metrics(streams_only, text_file, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    given = {"tokens": 192, "sequence_length": 16, "batch_size": 4, "freeze_backbone": True, "bf16": False}
    train(str(streams_only), tmp_path / "run", TrainSettings([str(text_file)], **given, report_to=["tensorboard"]))
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    events = accumulator.EventAccumulator(str(folder)).Reload().Scalars("train/loss")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event.step for event in events] == [line["step"] for line in lines]
    assert [event.value for event in events] == pytest.approx([line["loss"] for line in lines])


def test_a_tracker_that_nobody_knows():
    with pytest.raises(ValueError, match=r"There is no tracker 'wndb' to report to: .*tensorboard"):
        check_trackers(["tensorboard", "wndb"])


def test_a_tracker_whose_package_is_missing(monkeypatch):
    """Whether or not it is installed here."""
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(ValueError, match=r"Reporting to wandb needs its package: .*wandb"):
        check_trackers(["wandb"])


# Where each tracker writes, without a network, in the folder that it is started in.
OFFLINE = {
    "wandb": ({"WANDB_MODE": "offline"}, "wandb/offline-run-*/run-*.wandb"),
    "trackio": ({"TRACKIO_DIR": "trackio"}, "trackio/*.db"),
    "mlflow": (
        {"MLFLOW_TRACKING_URI": "file:./mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"},
        "mlruns/*/*/metrics/loss",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("tracker", OFFLINE)
def test_without_a_network(tracker, streams_only, text_file, tmp_path, programs):
    """A run that reports to a tracker of another company ends, and its losses lie in a file; where it is installed."""
    pytest.importorskip(tracker)
    environment, written = OFFLINE[tracker]
    command = ["train", streams_only, "--data", text_file, "--output", "run", "--freeze-backbone", "--tokens", "192"]
    command += ["--sequence-length", "16", "--batch-size", "4", "--report-to", tracker]
    done = programs.run("-m", "parscale", *command, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "training.json").exists()
    (file,) = tmp_path.glob(written)
    assert file.stat().st_size > 0
