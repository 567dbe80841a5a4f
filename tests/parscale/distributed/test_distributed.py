"""Wrapped models on two processes (gloo, CPU) do what they do in one, and read what the other has written."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from packaging.version import Version
from safetensors.torch import load_file

from parscale import load

WORKERS = Path(__file__).parent
EXAMPLES = Path(__file__).parents[3] / "examples" / "accelerate"


def imported(name: str) -> ModuleType:
    spec: Any = importlib.util.spec_from_file_location(f"distributed_{name}", WORKERS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def launch(programs: Any, tmp_path: Path) -> Any:
    """Runs a worker in several processes."""

    def run(processes: int, worker: str, *arguments: str | Path, **environment: str) -> None:
        programs.run_together(processes, WORKERS / f"{worker}.py", *arguments, cwd=tmp_path, **environment)

    return run


def figures(folder: Path, run: str) -> dict[str, Any]:
    return json.loads((folder / run / "figures.json").read_text())


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), atol=1e-5, rtol=0)


def same_tensors(folder: Path, other: Path, file: str = "model.safetensors") -> None:
    tensors, others = load_file(folder / file), load_file(other / file)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], atol=1e-5, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def check_run(folder: Path, run: str, expected: dict[str, Any], reference: str, steps: int) -> dict[str, Any]:
    """A run of two processes against the same run of one: figures, and what both have saved.

    Args:
        steps: how many of the last steps were the run's own.
    """
    actual = figures(folder, run)
    for name in ("losses", "norms"):
        assert len(actual[name]) == len(expected[name]) == 4
        if name == "norms" and actual["sharded"] and Version(torch.__version__) < Version("2.11"):
            continue  # under older torch the Trainer logs a sharded gradient's norm of the first process alone
        close(actual[name][-steps:], expected[name][-steps:])
    if "report" in actual:
        close(actual["report"], expected["report"])
        assert actual["generated"] == expected["generated"]
    same_tensors(folder / run / "whole", folder / reference / "whole")
    same_tensors(folder / run / "streams", folder / reference / "streams", "streams.safetensors")
    return actual


@pytest.fixture
def backbones(zoo, tmp_path):
    """A folder with the backbones that the workers read."""
    for name, tied in {"llama": False, "olmo2": False, "qwen2": True, "qwen3": True}.items():
        zoo.FAMILIES[name].build(tie_word_embeddings=tied).save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "runs",
    [
        pytest.param(("ddp-all", "ddp-from-one", "fsdp2-frozen"), id="one way each"),
        pytest.param(
            ("ddp-all", "ddp-frozen", "ddp-from-one", "fsdp2-all", "fsdp2-frozen"),
            id="both ways",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_the_trainer_under_ddp_and_fsdp2(runs, backbones, launch):
    worker = imported("train")
    one = {name: worker.train(backbones, name) for name in ("one-all", "one-frozen")}
    assert not one["one-all"]["sharded"]
    assert len(set(one["one-all"]["losses"])) == 4
    launch(2, "train", backbones, *runs)
    for run in runs:
        kind = "one-frozen" if run.endswith("frozen") else "one-all"
        actual = check_run(backbones, run, one[kind], kind, steps=2 if "from" in run else 4)
        assert actual["processes"] == 2
        assert actual["sharded"] == run.startswith("fsdp2")
        assert ("sharded by FSDP" in actual.get("refused", "")) == run.startswith("fsdp2")
        loaded = load(backbones / run / "whole")
        assert sorted(loaded.parscale.sets) == (["code", "default"] if kind == "one-frozen" else ["default"])
        assert load(backbones / run / "streams", backbone=backbones / worker.RUNS[run].backbone).num_streams == 4

    # what the Trainer itself writes
    for run in {"ddp-all", "fsdp2-all"} & set(runs):
        for folder in ("trainer", "checkpoint-4"):
            same_tensors(backbones / run / folder, backbones / "one-all" / folder)
    assert (backbones / "fsdp2-frozen" / "checkpoint-2" / "optimizer_0").is_dir()

    # checkpoints of two processes, gone on from in one
    resumed = worker.train(backbones, "one-from-ddp")
    close(resumed["losses"][-2:], one["one-all"]["losses"][-2:])
    launch(1, "train", backbones, "fsdp2-from-two")
    check_run(backbones, "fsdp2-from-two", one["one-frozen"], "one-frozen", steps=2)


@pytest.mark.slow
@pytest.mark.nightly  # as prefixes above, which run by day
def test_other_streams_under_ddp_and_fsdp2(backbones, launch):
    """Prompts, low-rank differences, and prefixes in front of keys that all streams share."""
    worker = imported("train")
    one = {name: worker.train(backbones, f"one-{name}") for name in ("prompt", "lora", "shared", "shared-all")}
    runs = [f"{kind}-{name}" for kind in ("ddp", "fsdp2") for name in one]
    launch(2, "train", backbones, *runs)
    for run in runs:
        kind, name = run.split("-", 1)
        actual = check_run(backbones, run, one[name], f"one-{name}", steps=4)
        assert actual["processes"] == 2
        assert actual["sharded"] == (kind == "fsdp2")


@pytest.mark.slow
def test_tensor_parallelism(backbones, launch):
    worker = imported("tensor_parallel")
    out = backbones / "tensor-parallel-1"
    expected = worker.run(backbones, out)
    launch(2, "tensor_parallel", backbones)
    actual = figures(backbones, "tensor-parallel-2")
    assert "tensor parallelism or ZeRO-3 takes transform='prefix' only, got 'lora'" in actual.pop("refused")
    assert actual.keys() == expected.keys()
    ((alone,), (first, second)) = expected.pop("failures"), actual.pop("failures")
    assert first == alone.replace("tensor-parallel-1", "tensor-parallel-2")
    assert second == f"RuntimeError: Process 0 failed: {first}"
    assert [actual[f"{name} heads here"] for name in worker.BACKBONES] == [1, 1, 2]
    assert actual["all of them DTensors"]
    for name, value in expected.items():
        if name in ("generated", "sampled", "its further set", "generated with shared keys"):
            assert actual[name] == value, name
        elif isinstance(value, float | list):
            close(actual[name], value)
    for name in ("full", "shared", *worker.BACKBONES):
        same_tensors(backbones / "tensor-parallel-2" / name, out / name)
    for folder in ("streams", "full/code"):
        same_tensors(backbones / "tensor-parallel-2" / folder, out / folder, "streams.safetensors")
    loaded = load(backbones / "tensor-parallel-2" / "full")
    close(worker.loss_of(loaded), expected["full folder"])


@pytest.mark.slow
def test_the_trainer_under_zero3(backbones, launch):
    pytest.importorskip("deepspeed")
    worker = imported("train")
    one = {name: worker.train(backbones, name) for name in ("one-all", "one-context")}
    launch(2, "train", backbones, "zero3-all", "zero3-context", DS_ACCELERATOR="cpu")
    for run in ("zero3-all", "zero3-context"):
        reference = run.replace("zero3", "one")
        actual = check_run(backbones, run, one[reference], reference, steps=4)
        assert actual["processes"] == 2
        assert actual["sharded"]
        assert "sharded by DeepSpeed" in actual["refused"]
        same_tensors(backbones / run / "trainer", backbones / reference / "trainer")
    assert sorted(load(backbones / "zero3-context" / "whole").parscale.sets) == ["code", "default"]


def test_a_tensor_parallel_plan_for_one_process_splits_nothing(wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path)
    loaded = load(tmp_path, tp_plan="auto")
    ids = torch.arange(9)[None] + 3
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, load(tmp_path)(ids).logits)
    assert all(type(parameter) is torch.nn.Parameter for parameter in loaded.parameters())


def test_plans_that_are_none(wrapped, tmp_path):
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tp_plan must be 'auto' or a dictionary of names and styles, got 'all'"):
        load(tmp_path, tp_plan="all")
    with pytest.raises(ValueError, match="give only one of them"):
        load(tmp_path, tp_plan="auto", distributed_config={"tp_size": 1})


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_accelerate_reads_the_configuration_files(name):
    config = load_config_from_file(str(EXAMPLES / f"{name}.yaml"))
    assert config.num_processes == 2
    assert config.distributed_type.name == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[name]
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name == "zero3":
        path = EXAMPLES.parents[1] / config.deepspeed_config["deepspeed_config_file"]
        assert json.loads(path.read_text())["zero_optimization"]["stage"] == 3
