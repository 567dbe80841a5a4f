"""Two processes at one folder, other contents under the same names, and more devices than processes."""

import json
import os
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import stopped_after
from transformers import LlamaForCausalLM, TrainingArguments

from parscale import ParScaleConfig, load
from parscale.checkpoints.conversion.convert import convert
from parscale.checkpoints.training.digests import checkpoint_digest, streamed_digest
from parscale.checkpoints.training.run_folder import MANIFEST, Run
from parscale.checkpoints.training.train import Interrupted, TrainSettings, train
from parscale.checkpoints.training.trainer import OneDeviceArguments

S, BATCH, STEPS = 16, 4, 4


def settings(text_file, **options):
    return TrainSettings(
        **{
            "data": [str(text_file)],
            "eval_data": {"code": str(text_file)},
            "eval_tokens": 64,
            "tokens": STEPS * BATCH * S,
            "sequence_length": S,
            "batch_size": BATCH,
            "learning_rate": 1e-3,
            "save_every": 1,
            "bf16": False,
            "freeze_backbone": True,
        }
        | options
    )


# -- two processes


@pytest.fixture
def train_in_a_process(programs, tmp_path):
    def start(checkpoint, output, chosen, *, resume=False):
        script = (
            "import sys\nfrom pathlib import Path\nfrom parscale.checkpoints import TrainSettings, train\n"
            f"try:\n    train({str(checkpoint)!r}, Path({str(output)!r}), {chosen!r}, resume={resume})\n"
            "except (ValueError, OSError) as error:\n    sys.exit(f'said: {error}')\n"
        )
        return programs.start("-P", "-c", script, cwd=tmp_path)

    return start


@pytest.mark.parametrize("resume", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_a_second_process_is_refused_and_the_first_is_not_disturbed(
    full, text_file, tmp_path, monkeypatch, train_in_a_process, resume
):
    """It comes while the first saves a checkpoint."""
    publish, others = Run.publish, []

    def publish_later(self, written, step, **options):
        if step == 2:
            other = train_in_a_process(full, tmp_path / "run", settings(text_file), resume=resume)
            other.wait()
            others.append(other.stderr)
            assert written.is_dir()
        publish(self, written, step, **options)

    monkeypatch.setattr(Run, "publish", publish_later)
    train(str(full), tmp_path / "run", settings(text_file))
    assert ("another process is writing there" if resume else "is not empty") in others[0]
    train(str(full), tmp_path / "alone", settings(text_file))
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "alone"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    found, expected = (torch.load(tmp_path / name / "checkpoint-4" / "optimizer.pt") for name in ("run", "alone"))
    torch.testing.assert_close(found["state"], expected["state"], rtol=0, atol=0)
    assert Run(tmp_path / "run").newest_checkpoint() == tmp_path / "run" / "checkpoint-4"


def test_two_that_begin_at_one_time(full, text_file, tmp_path, train_in_a_process):
    """One of them runs to its end, and the other says why not."""
    processes = [train_in_a_process(full, tmp_path / "run", settings(text_file), resume=True) for _ in range(2)]
    codes = [process.wait() for process in processes]
    assert 0 in codes
    for code, process in zip(codes, processes, strict=True):
        assert code == 0 or "another process is writing there" in process.stderr, process.stderr
    assert Run(tmp_path / "run").report()["steps"] == STEPS
    assert [line["step"] for line in Run(tmp_path / "run").metrics() if "loss" in line] == [1, 2, 3, 4]


def test_a_run_that_failed_can_be_gone_on_with_in_the_same_process(full, text_file, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("failed")

    monkeypatch.setattr("parscale.checkpoints.training.train.finish", fail)
    with pytest.raises(RuntimeError, match="failed"):
        train(str(full), tmp_path / "run", settings(text_file))
    monkeypatch.undo()
    assert not train(str(full), tmp_path / "run", settings(text_file), resume=True)["finished_before"]


def test_two_conversions_into_one_folder(backbone, tmp_path, monkeypatch):
    started, end, errors = threading.Event(), threading.Event(), []
    save = LlamaForCausalLM.save_pretrained

    def save_slowly(self, *args, **kwargs):
        started.set()
        assert end.wait(60)
        return save(self, *args, **kwargs)

    def first():
        convert(str(backbone), tmp_path / "model", ParScaleConfig(2, 4, init="random", seed=0))

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save_slowly)
    thread = threading.Thread(target=first)
    thread.start()
    assert started.wait(60)
    try:
        convert(str(backbone), tmp_path / "model", ParScaleConfig(3, 4, init="random", seed=0))
    except OSError as error:
        errors.append(str(error))
    end.set()
    thread.join()
    assert "another process is writing there" in errors[0]
    assert load(tmp_path / "model").num_streams == 2
    assert os.listdir(tmp_path) == ["model"]


# -- other contents under the same names


@pytest.fixture
def own(full, streams_only, backbone, text_file, tmp_path):
    """Checkpoints and texts that a test may change: streams alone beside their backbone, and a full checkpoint."""
    shutil.copytree(full, tmp_path / "full")
    shutil.copytree(backbone, tmp_path / "backbone")
    shutil.copytree(streams_only, tmp_path / "streams")
    config = json.loads((tmp_path / "streams" / "parscale_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "backbone")
    (tmp_path / "streams" / "parscale_config.json").write_text(json.dumps(config))
    shutil.copy(text_file, tmp_path / "measured.py")
    return tmp_path


def change_weights(path):
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, path, metadata={"format": "pt"})


def change_config(path):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rms_norm_eps": 0.1}))


def change_text(path):
    path.write_text(path.read_text().replace("x + 1", "x * 7"))


CHANGES = {
    "the backbone of streams": ("streams", "backbone/model.safetensors", change_weights, "checkpoint_digest"),
    "the backbone's configuration": ("streams", "backbone/config.json", change_config, "checkpoint_digest"),
    "the streams": ("streams", "streams/streams.safetensors", change_weights, "checkpoint_digest"),
    "a full checkpoint": ("full", "full/model.safetensors", change_weights, "checkpoint_digest"),
    "its configuration": ("full", "full/config.json", change_config, "checkpoint_digest"),
    "the text to measure on": ("streams", "measured.py", change_text, "eval_digests.*eval_data, code"),
    "the text": ("streams", "text.py", change_text, "data_digest.*the contents of data"),
    "streamed text": ("streams", "text.py", change_text, "data_digest.*the contents of data"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_contents_are_refused(own, what):
    which, path, change, said = CHANGES[what]
    options = {"eval_data": {"code": str(own / "measured.py")}, "streaming": what == "streamed text"}
    chosen = settings(own / "text.py", **options)
    with stopped_after(2), pytest.raises(Interrupted):
        train(str(own / which), own / "run", chosen)
    kept = (own / path).read_bytes()
    change(own / path)
    before = sorted(entry.name for entry in (own / "run").iterdir())
    with pytest.raises(ValueError, match=f"{said}.* have changed; restore the old contents"):
        train(str(own / which), own / "run", chosen, resume=True)
    assert sorted(entry.name for entry in (own / "run").iterdir()) == before
    if what == "the text to measure on":  # as an example of all
        (own / path).write_bytes(kept)
        assert train(str(own / which), own / "run", chosen, resume=True)["steps"] == STEPS


def test_a_checkpoint_that_changes_while_the_run_lasts(own, monkeypatch):
    """The frozen backbone of the result is read at the end."""
    weights = own / "full" / "model.safetensors"
    kept = weights.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(Run, "publish", change_after(Run.publish, lambda: change_weights(weights)))
        with pytest.raises(ValueError, match=r"full has changed during the run.* continue with --resume"):
            train(str(own / "full"), own / "run", settings(own / "text.py"))
    assert Run(own / "run").report() is None
    weights.write_bytes(kept)
    assert train(str(own / "full"), own / "run", settings(own / "text.py"), resume=True)["steps"] == STEPS


def change_after(publish, change):
    def publishing(self, written, step, **options):
        publish(self, written, step, **options)
        if step == STEPS:
            change()

    return publishing


def test_a_run_of_an_older_version_goes_on(own):
    """It has not written down the contents of all that it read."""
    chosen = settings(own / "text.py")
    with stopped_after(2), pytest.raises(Interrupted):
        train(str(own / "streams"), own / "run", chosen)
    written = json.loads((own / "run" / "run.json").read_text())
    del written["checkpoint_digest"], written["eval_digests"]
    (own / "run" / "run.json").write_text(json.dumps(written))
    for path in (own / "run").rglob(MANIFEST):
        manifest = json.loads(path.read_text())
        del manifest["processes"]
        path.write_text(json.dumps(manifest))
    assert train(str(own / "streams"), own / "run", chosen, resume=True)["steps"] == STEPS


def test_a_digest_is_of_contents_and_not_of_places(own, tmp_path):
    for which in ("full", "backbone"):
        shutil.copytree(own / which, tmp_path / "copies" / which)
        assert checkpoint_digest(str(own / which)) == checkpoint_digest(str(tmp_path / "copies" / which))
    (own / "full" / "README.md").write_text("About it.")
    assert checkpoint_digest(str(own / "full")) == checkpoint_digest(str(tmp_path / "copies" / "full"))
    model = load(own / "full")
    model.add_streams("other", 2, prefix_length=3, init="random", seed=5)
    model.save_pretrained(own / "two", max_shard_size="30KB")
    first = checkpoint_digest(str(own / "two"))
    change_weights(own / "two" / "other" / "streams.safetensors")
    assert checkpoint_digest(str(own / "two")) != first
    second = checkpoint_digest(str(own / "two"))
    change_weights(sorted((own / "two").glob("model-*.safetensors"))[-1])
    assert checkpoint_digest(str(own / "two")) != second


def test_a_digest_of_streamed_data_is_of_its_beginning_and_its_files_sizes(tmp_path):
    """What is read later is not read beforehand."""
    file = tmp_path / "texts" / "a.txt"
    file.parent.mkdir()
    file.write_text("text")
    for name in (file, file.parent):
        file.write_text("text")
        first = streamed_digest("beginning", [str(name)])
        assert streamed_digest("other", [str(name)]) != first
        file.write_text("texts")
        assert streamed_digest("beginning", [str(name)]) != first


# -- more devices than processes


@pytest.fixture
def two_gpus(monkeypatch):
    """What the Trainer's arguments find where no launcher has started the process; the tensors stay on the CPU."""
    setup = TrainingArguments.__dict__["_setup_devices"].func

    def as_with_two(self):
        device = setup(self)
        self._n_gpu = 2
        return device

    from functools import cached_property

    replaced = cached_property(as_with_two)
    replaced.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", replaced)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_of_several_gpus_one_process_uses_one(full, text_file, tmp_path, two_gpus):
    assert TrainingArguments(tmp_path).n_gpu == 2
    assert OneDeviceArguments(tmp_path, per_device_train_batch_size=BATCH).train_batch_size == BATCH
    with pytest.warns(
        UserWarning, match=r"2 GPUs .* only one is used; .*torchrun --nproc-per-node 2 -m parscale train"
    ):
        report = train(str(full), tmp_path / "run", settings(text_file))
    assert report["tokens"] == STEPS * BATCH * S


def test_the_steps_are_those_of_one_device(full, text_file, tmp_path, request):
    train(str(full), tmp_path / "one", settings(text_file))
    request.getfixturevalue("two_gpus")
    with pytest.warns(UserWarning, match="2 GPUs are available"):
        train(str(full), tmp_path / "two", settings(text_file))
    one, two = (
        [line.get("loss", line.get("eval_loss")) for line in Run(tmp_path / name).metrics()] for name in ("one", "two")
    )
    assert one == two
