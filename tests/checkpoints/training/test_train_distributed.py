"""`train` on two processes (gloo, CPU): the losses of one, and runs that go on with another number of processes."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale import ParScaleConfig, load
from parscale.checkpoints.evaluation.controls import ARMS, prepare_arm
from parscale.checkpoints.training.new_model import NewModel
from parscale.checkpoints.training.run_folder import MANIFEST, Run
from parscale.checkpoints.training.train import TrainSettings, train

STEPS = 4
CONFIGURATIONS = Path(__file__).parents[3] / "examples" / "accelerate"
WAYS = {"everything": {}, "streams": {"freeze_backbone": True}, "lora": {"lora_rank": 2}}


@pytest.fixture(scope="module")
def settings(sentences):
    return {
        "data": [str(sentences)],
        "eval_data": {"same": str(sentences)},
        "tokens": STEPS * 4 * 32,
        "sequence_length": 32,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "save_every": 2,
        "eval_every": 2,
        "eval_tokens": 128,
        "bf16": False,
    }


@pytest.fixture(scope="module")
def one(full, settings, tmp_path_factory):
    """The folder of one process's run, by what trains."""
    folder = tmp_path_factory.mktemp("one")

    @functools.cache
    def run(name):
        train(str(full), folder / name, TrainSettings(**settings | WAYS[name]))
        return folder / name

    return run


@pytest.fixture
def launch(programs, tmp_path):
    """Trains in several processes."""

    def run(processes, runs, **environment):
        worker = Path(__file__).with_name("distributed_worker.py")
        programs.run_together(processes, worker, json.dumps(runs), cwd=tmp_path, **environment)

    return run


def request(checkpoint, output, settings, *, resume=False):
    """A run for the worker; a new model is given as a dictionary."""
    given = checkpoint if isinstance(checkpoint, dict) else str(checkpoint)
    return {"checkpoint": given, "output": str(output), "settings": settings, "resume": resume}


def fsdp2(kind):
    """What `accelerate launch` makes of the configuration file."""
    options = yaml.safe_load((CONFIGURATIONS / "fsdp2.yaml").read_text())["fsdp_config"] | {
        "fsdp_state_dict_type": kind
    }
    return {"ACCELERATE_USE_FSDP": "true"} | {name.upper(): str(value).lower() for name, value in options.items()} | {
        "FSDP_AUTO_WRAP_POLICY": options["fsdp_auto_wrap_policy"], "FSDP_STATE_DICT_TYPE": kind
    }  # fmt: skip


def assert_same(folder, expected):
    lines, wanted = Run(folder).metrics(), Run(expected).metrics()
    assert len(lines) == len(wanted)
    for line, other in zip(lines, wanted, strict=True):
        for name in ("step", "tokens", "text"):
            assert line.get(name) == other.get(name)
        for name in ("loss", "eval_loss", "backbone_loss"):
            assert line.get(name) == pytest.approx(other.get(name), abs=1e-5)
    model, same = load(folder), load(expected)
    for name, parameter in same.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, atol=4e-3, rtol=2e-2)


def stop_after_two_steps(folder, copy):
    """A copy of a run, as if it had been stopped there."""
    shutil.copytree(folder, copy)
    for path in list(copy.iterdir()):
        if path.is_file() and path.name not in ("run.json", "metrics.jsonl"):
            path.unlink()
    shutil.rmtree(copy / f"checkpoint-{STEPS}")
    assert (copy / "checkpoint-2" / MANIFEST).exists()
    return copy


def ways(*names, daily):
    """What trains; by day one of them."""
    return [name if name == daily else pytest.param(name, marks=pytest.mark.nightly) for name in names]


@pytest.mark.parametrize("way", ways("everything", "streams", "lora", daily="streams"))
def test_ddp(full, settings, one, tmp_path, launch, way):
    """And what two processes have begun goes on in one, and the other way round.

    A batch of three rows is refused, and an output folder or data that are others for each process.
    """
    chosen = settings | WAYS[way]
    stopped = stop_after_two_steps(one(way), tmp_path / "from-one")
    refused = request(full, tmp_path / "refused", chosen | {"batch_size": 3})
    apart = request(full, "out/run", chosen) | {"apart": str(tmp_path / "apart")}
    for process in range(2):
        (tmp_path / "apart" / str(process)).mkdir(parents=True)
        (tmp_path / "apart" / str(process) / "text.txt").write_text(f"Words of process {process}. " * 100)
    others = request(full, tmp_path / "others", chosen | {"data": ["text.txt"]}) | {"apart": str(tmp_path / "apart")}
    measured = chosen | {"eval_data": {"held out": "text.txt"}}
    launch(
        2,
        [
            refused | {"refused": "must be a multiple of the 2 processes"},
            apart | {"refused": "The output folder out/run is not the same on all nodes; give one on a shared"},
            others | {"refused": "The training data of process 1 is not that of process 0; give files of the same"},
            others | {"settings": measured, "refused": "The eval data held out of process 1 is not that of process 0"},
            request(full, tmp_path / "two", chosen),
            request(full, stopped, chosen, resume=True),
        ],
    )
    assert not (tmp_path / "refused").exists()
    assert not (tmp_path / "others").exists()
    assert sorted(path.name for path in (tmp_path / "apart").rglob("*")) == ["0", "1", *["text.txt"] * 2]
    assert_same(tmp_path / "two", one(way))
    assert_same(tmp_path / "from-one", one(way))
    stopped = stop_after_two_steps(tmp_path / "two", tmp_path / "from-two")
    train(str(full), stopped, TrainSettings(**chosen), resume=True)
    assert_same(stopped, one(way))


def test_a_control_of_one_prefix(backbone, settings, tmp_path, launch):
    """Prepared by hand, it ends in two processes as in one; the two streams that it is made of stay equal."""
    (arm,) = (arm for arm in ARMS if arm.name == "prefix")
    model, calibration = AutoModelForCausalLM.from_pretrained(backbone), torch.arange(3, 15).view(3, 4)
    prepare_arm(arm, model, ParScaleConfig(3, prefix_length=4), calibration).save_pretrained(tmp_path / "start")
    AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path / "start")
    chosen = settings | WAYS["streams"]
    train(str(tmp_path / "start"), tmp_path / "one", TrainSettings(**chosen))
    launch(2, [request(tmp_path / "start", tmp_path / "two", chosen)])
    assert_same(tmp_path / "two", tmp_path / "one")
    before = load(tmp_path / "start").state_dict()
    prefixes = {name: tensor for name, tensor in load(tmp_path / "two").state_dict().items() if "prefix_" in name}
    assert prefixes
    for name, tensor in prefixes.items():
        assert torch.equal(tensor[0], tensor[1])
        assert not torch.equal(tensor, before[name])


@pytest.mark.parametrize("way", ways("everything", "streams", daily="everything"))
@pytest.mark.parametrize("kind", [pytest.param("FULL_STATE_DICT", marks=pytest.mark.nightly), "SHARDED_STATE_DICT"])
def test_fsdp2(full, settings, one, tmp_path, kind, way, launch):
    """Also begun by two processes and gone on with by one, under FSDP too."""
    chosen = settings | WAYS[way]
    launch(2, [request(full, tmp_path / "two", chosen)], **fsdp2(kind))
    assert_same(tmp_path / "two", one(way))
    stopped = stop_after_two_steps(tmp_path / "two", tmp_path / "from-two")
    launch(1, [request(full, stopped, chosen, resume=True)], **fsdp2(kind))
    assert_same(stopped, one(way))


@pytest.mark.nightly  # by day a new model in one process, see test_new_model.py, and a checkpoint in two
def test_a_new_model_in_parts(backbone, settings, tmp_path, launch):
    """Both processes make the same weights; begun and gone on with under FSDP, they end as in one process."""
    streams = {"num_streams": 3, "prefix_length": 4, "kv": "shared"}
    new = {"config": str(backbone / "config.json"), "tokenizer": str(backbone), "streams": streams, "seed": 5}
    made = NewModel(backbone / "config.json", str(backbone), ParScaleConfig(**streams), seed=5)
    train(made, tmp_path / "one", TrainSettings(**settings))
    launch(2, [request(new, tmp_path / "two", settings)], **fsdp2("SHARDED_STATE_DICT"))
    assert_same(tmp_path / "two", tmp_path / "one")
    stopped = stop_after_two_steps(tmp_path / "two", tmp_path / "stopped")
    launch(2, [request(new, stopped, settings, resume=True)], **fsdp2("SHARDED_STATE_DICT"))
    assert_same(stopped, tmp_path / "one")


def test_zero3(full, settings, one, tmp_path, launch):
    pytest.importorskip("deepspeed")
    names = ("everything", "streams")
    environment = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(CONFIGURATIONS / "zero3.json"),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        "DS_ACCELERATOR": "cpu",
    }
    launch(2, [request(full, tmp_path / name, settings | WAYS[name]) for name in names], **environment)
    for name in names:
        assert_same(tmp_path / name, one(name))
