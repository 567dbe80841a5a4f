"""`train` where prompts or low-rank differences make the streams differ."""

import shutil

import pytest
import torch
from training_runs import BATCH, S, is_of_streams, losses_of, run_by_hand
from transformers import AutoTokenizer, LlamaForCausalLM

from parscale import load, wrap
from parscale.checkpoints.description import describe
from parscale.checkpoints.training.train import TrainSettings, train

STEPS = 4


@pytest.fixture(scope="module", params=["prompt", "lora"])
def checkpoint(request, backbone, tmp_path_factory):
    """A full checkpoint, and the streams alone, in float32."""
    folder = tmp_path_factory.mktemp(request.param)
    model = LlamaForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    model.name_or_path = str(backbone)
    wrap(model, 3, prefix_length=4, rank=2, transform=request.param, init="random", seed=1)
    model.save_pretrained(folder / "full")
    model.save_streams(folder / "streams")
    for kind in ("full", "streams"):
        AutoTokenizer.from_pretrained(backbone).save_pretrained(folder / kind)
    return folder


def settings(text_file, **options):
    common = {"tokens": STEPS * BATCH * S, "sequence_length": S, "batch_size": BATCH, "warmup": 0.0, "decay": 0.0}
    common |= {"learning_rate": 1e-2, "bf16": False, "save_every": STEPS}
    return TrainSettings(data=[str(text_file)], **common | options)


@pytest.mark.grid
@pytest.mark.parametrize("kind", ["full", "streams"])
def test_takes_the_steps_of_a_loop_by_hand(checkpoint, kind, text_file, tmp_path):
    """Documents packed into rows too; with a frozen backbone."""
    source = checkpoint / kind
    report = train(str(source), tmp_path / "run", settings(text_file, freeze_backbone=True))
    losses, parameters = run_by_hand(source, text_file, frozen=True, factors=[1.0] * STEPS, streams_rate=1e-2)
    assert losses_of(tmp_path / "run") == pytest.approx(losses, abs=2e-5)
    assert report["streams_learning_rate"] == 1e-2
    before, after = load(source), load(tmp_path / "run")
    for name, parameter in after.named_parameters():
        torch.testing.assert_close(parameter.float(), parameters[name], atol=5e-4, rtol=1e-2)
        assert torch.equal(parameter, before.get_parameter(name)) is not is_of_streams(name), name
    for key in ("kind", "transform", "num_streams", "parameters"):
        assert describe(str(tmp_path / "run"))[key] == describe(str(source))[key]


def test_the_rate_is_that_of_the_transform(checkpoint, text_file, tmp_path):
    options = settings(text_file, freeze_backbone=True, learning_rate=None)
    rate = train(str(checkpoint / "full"), tmp_path / "run", options)["streams_learning_rate"]
    assert rate == {"prompt": 1e-3, "lora": 3e-3}[describe(str(checkpoint / "full"))["transform"]]


def test_an_adapter_beside_the_streams(checkpoint, text_file, tmp_path):
    """It is merged into the backbone, and the streams' own differences stay apart."""
    pytest.importorskip("peft")
    before = load(checkpoint / "full")
    train(str(checkpoint / "full"), tmp_path / "run", settings(text_file, lora_rank=4))
    after = load(tmp_path / "run")
    moved = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert {name for name in moved if is_of_streams(name)} == {
        name for name, _ in after.named_parameters() if is_of_streams(name)
    }
    assert any("q_proj.weight" in name for name in moved)
    assert not any("norm" in name or "embed" in name for name in moved)
    assert losses_of(tmp_path / "run")[-1] < losses_of(tmp_path / "run")[0]


def test_an_interrupted_run_goes_on(checkpoint, text_file, tmp_path):
    chosen = settings(text_file, save_every=2)
    train(str(checkpoint / "full"), tmp_path / "whole", chosen)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    report = tmp_path / "parts" / "training.json"
    report.unlink()  # as if it had been killed before its end
    for path in (tmp_path / "parts").glob("checkpoint-4/*"):
        path.unlink()
    (tmp_path / "parts" / "checkpoint-4").rmdir()
    train(str(checkpoint / "full"), tmp_path / "parts", chosen, resume=True)
    first, second = load(tmp_path / "whole"), load(tmp_path / "parts")
    for name, parameter in first.named_parameters():
        assert torch.equal(second.get_parameter(name), parameter), name
