"""`train` with flash-attention: the model is loaded on the CPU in float32, and trained on a GPU in half precision.

A stand-in for the package refuses what the package refuses, and takes the CPU for a GPU once the Trainer has the model.
"""

import json

import pytest
from flash_stand_in import StandIn
from transformers import PreTrainedModel

from parscale.checkpoints.texts.documents import Source
from parscale.checkpoints.training.train import TrainSettings, train
from parscale.checkpoints.training.trainer import StreamsTrainer

FLASH = "flash_attention_2"
DOCUMENTS = Source.of("lines", [(f"{number}", f"x += {number}") for number in range(60)])


@pytest.fixture
def flash(monkeypatch):
    stand_in = StandIn()
    stand_in.strict = True
    stand_in.install(monkeypatch)
    make_trainer = StreamsTrainer.__init__

    def on_gpu(self, *args, **options):
        make_trainer(self, *args, **options)
        stand_in.on_gpu = True

    monkeypatch.setattr(StreamsTrainer, "__init__", on_gpu)
    # as where the package is installed
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda self, *args, **options: True)
    return stand_in


def settings(**options):
    chosen = {"tokens": 3 * 4 * 16, "sequence_length": 16, "batch_size": 4, "micro_batch_size": 1, "bf16": True}
    return TrainSettings([DOCUMENTS], **chosen | options)


def losses_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("frozen", [True, False])
def test_losses_are_those_of_other_attention(full, tmp_path, flash, frozen):
    chosen = {"freeze_backbone": frozen, "streams_learning_rate": 3e-2}
    train(str(full), tmp_path / "sdpa", settings(**chosen))
    assert not flash.calls
    flash.on_gpu = False
    train(str(full), tmp_path / "flash", settings(**chosen, attn_implementation=FLASH))
    assert "joined" in flash.calls  # documents that are packed
    # of the size of bfloat16's rounding
    assert losses_of(tmp_path / "flash") == pytest.approx(losses_of(tmp_path / "sdpa"), rel=0.01)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bf16": False}, r"flash_attention_2 computes in half precision, and this run in float32; give --bf16"),
        ({"micro_batch_size": 2}, r"apart only where one sequence runs at once.*--micro-batch-size 1"),
    ],
)
def test_what_flash_attention_cannot_do_is_said_before_anything_is_written(full, tmp_path, flash, options, said):
    with pytest.raises(ValueError, match=said):
        train(str(full), tmp_path / "run", settings(attn_implementation=FLASH, **options))
    assert not (tmp_path / "run").exists()
