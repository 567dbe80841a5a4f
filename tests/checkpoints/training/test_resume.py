"""Runs that are interrupted, killed or out of disk, and go on as if nothing had been."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import small_disk
import torch
import transformers.modeling_utils
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

from parscale import load
from parscale.checkpoints.description import describe
from parscale.checkpoints.training.run_folder import MANIFEST, Run, damage, write_manifest
from parscale.checkpoints.training.train import TrainSettings, train
from parscale.format.working import MARKER

STEPS = 6
INTERRUPTED = 130


@pytest.fixture(scope="module")
def checkpoint(full, tmp_path_factory):
    """With dropout, so that the state of the random numbers counts."""
    folder = tmp_path_factory.mktemp("resume") / "dropout"
    model = load(full)
    model.config.attention_dropout = 0.2
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(full).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def options(sentences):
    """More steps than one round of the data has; the last of the two rounds is cut."""
    return {
        "data": [str(sentences)],
        "eval_data": {"same": str(sentences)},
        "tokens": STEPS * 4 * 32,
        "sequence_length": 32,
        "batch_size": 4,
        "micro_batch_size": 2,
        "learning_rate": 1e-2,
        "save_every": 1,
        "eval_every": 2,
        "eval_tokens": 64,
        "bf16": False,
    }


class Server:
    """Asks the program `fork_server.py`, which calls when it is ready."""

    def __init__(self, programs, checkpoint, folder):
        with socket.create_server(("127.0.0.1", 0)) as door:
            script = Path(__file__).with_name("fork_server.py")
            self.program = programs.start(script, checkpoint, door.getsockname()[1], cwd=folder)
            door.settimeout(1)
            self.line = None
            while self.line is None:
                assert self.program.is_running(), self.program.stderr
                with contextlib.suppress(TimeoutError):
                    self.line, _ = door.accept()
        self.line.settimeout(None)
        self.asked, self.answered = self.line.makefile("w"), self.line.makefile("r")

    def __call__(self, checkpoint, output, options, *, resume=False, **more):
        request = {"checkpoint": str(checkpoint), "output": str(output), "settings": options, "resume": resume} | more
        print(json.dumps(request), file=self.asked, flush=True)
        line = self.answered.readline()
        assert line, self.program.stderr
        answer = json.loads(line)
        assert answer["code"] != 1, self.program.stderr
        return answer

    def close(self):
        for each in (self.asked, self.answered, self.line):
            each.close()
        assert self.program.wait() == 0, self.program.stderr


@pytest.fixture(scope="module")
def server(programs, checkpoint, tmp_path_factory):
    server = Server(programs, checkpoint, tmp_path_factory.mktemp("server"))
    yield server
    server.close()


def contents(folder):
    """The result of a run: its tensors, and what it has written of each step, but for times."""
    lines = Run(folder).metrics()
    for line in lines:
        line.pop("tokens_per_second", None)
    return load_file(folder / "model.safetensors"), lines


def assert_same(folder, expected):
    tensors, lines = contents(folder)
    assert tensors.keys() == expected[0].keys()
    assert all(torch.equal(tensor, expected[0][name]) for name, tensor in tensors.items())
    assert lines == expected[1]
    assert not [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]


def assert_readable(folder):
    """No checkpoint is there in part, and the folder is no model in part."""
    if not folder.exists():
        return
    for step in Run(folder).steps():
        assert damage(Run(folder).checkpoint(step)) is None
    if (folder / "config.json").exists():
        describe(str(folder))
        load(folder)


@pytest.fixture(scope="module")
def whole(server, checkpoint, options, tmp_path_factory):
    """By what trains, the run that nothing stopped: its result, its seconds, its file operations and its folder."""
    results = {}
    for frozen in (True, False):
        output = tmp_path_factory.mktemp("resume") / "whole"
        start = time.perf_counter()
        answer = server(checkpoint, output, options | {"freeze_backbone": frozen}, count=True)
        assert answer["code"] == 0
        results[frozen] = (contents(output), time.perf_counter() - start, answer["count"], output)
    return results


def test_the_same_run_twice_is_the_same(whole, server, checkpoint, options, tmp_path):
    assert server(checkpoint, tmp_path / "run", options)["code"] == 0
    assert_same(tmp_path / "run", whole[False][0])


def sample(cases, daily):
    """All cases; those that are not in `daily` are for the night."""
    return [case if case in daily else pytest.param(case, marks=pytest.mark.nightly) for case in cases]


@pytest.mark.parametrize("seed", sample(range(20), daily=[1]))
def test_killed_at_a_random_moment(whole, server, checkpoint, options, tmp_path, seed):
    frozen = seed % 2 == 0
    expected, seconds, *_ = whole[frozen]
    options = options | {"freeze_backbone": frozen}
    after = random.Random(seed).uniform(0.1, 1.0) * seconds
    answer = server(checkpoint, tmp_path / "run", options, signal="SIGKILL", after=after)
    assert answer["code"] in (-signal.SIGKILL, 0)
    assert_readable(tmp_path / "run")
    assert server(checkpoint, tmp_path / "run", options, resume=True)["code"] == 0
    assert_same(tmp_path / "run", expected)


@pytest.mark.parametrize("share", sample(range(24), daily=(7, 16)))
def test_killed_at_a_file_operation(whole, server, checkpoint, options, tmp_path, share):
    """Spread over all operations that a run makes in its folder, from the first to the last."""
    frozen = share % 2 == 0
    expected, _, operations, _ = whole[frozen]
    options = options | {"freeze_backbone": frozen}
    at = 1 + share * (operations - 1) // 23
    assert server(checkpoint, tmp_path / "run", options, signal="SIGKILL", at=at)["code"] == -signal.SIGKILL
    assert_readable(tmp_path / "run")
    assert server(checkpoint, tmp_path / "run", options, resume=True)["code"] == 0
    assert_same(tmp_path / "run", expected)


@pytest.mark.parametrize("name", sample(["SIGINT", "SIGTERM", "SIGHUP"], daily=["SIGINT", "SIGTERM"]))
def test_a_signal_to_stop(whole, server, checkpoint, options, tmp_path, name):
    """It ends after the step under way with a checkpoint, although none was due."""
    options = options | {"save_every": 100}
    for at in range(10, 40, 3):  # file operations; until one falls between the first step and the last
        answer = server(checkpoint, tmp_path / f"run{at}", options, signal=name, at=at)
        if answer["code"] == INTERRUPTED and Run(tmp_path / f"run{at}").steps():
            break
    assert answer["code"] == INTERRUPTED
    os.rename(tmp_path / f"run{at}", tmp_path / "run")
    (step,) = Run(tmp_path / "run").steps()
    assert 0 < step < STEPS
    assert Run(tmp_path / "run").metrics()[-1]["step"] == step
    assert server(checkpoint, tmp_path / "run", options, resume=True)["code"] == 0
    assert_same(tmp_path / "run", whole[False][0])


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def turn_a_bit(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def without_result(output):
    """The folder of a finished run, of which only its checkpoints and records are left."""
    for entry in output.iterdir():
        if entry.is_file() and entry.name not in ("run.json", "metrics.jsonl"):
            entry.unlink()
    return output


@pytest.fixture
def stopped(tmp_path, whole):
    """A finished run of which only the checkpoints after five and six steps are left."""
    return without_result(shutil.copytree(whole[False][3], tmp_path / "run"))


TORN = [
    ("optimizer.pt", cut, "optimizer.pt has"),
    ("model.safetensors", turn_a_bit, "the contents of model.safetensors have changed"),
    ("trainer_state.json", Path.unlink, "it lacks trainer_state.json"),
    (MANIFEST, Path.unlink, "it lacks manifest.json, which is written last"),
    (MANIFEST, cut, "cannot be read"),
]


@pytest.mark.parametrize(("file", "spoil", "said"), TORN)
def test_a_torn_checkpoint_is_passed_over(stopped, file, spoil, said):
    spoil(stopped / "checkpoint-6" / file)
    with pytest.warns(UserWarning, match=f"checkpoint-6 is skipped: .*{said}"):
        assert Run(stopped).newest_checkpoint() == stopped / "checkpoint-5"


@pytest.mark.parametrize(
    ("file", "spoil", "said"),
    [TORN[1], *(pytest.param(*case, marks=pytest.mark.nightly) for case in TORN if case is not TORN[1])],
)
def test_a_run_goes_on_from_before_a_torn_checkpoint(stopped, checkpoint, options, whole, file, spoil, said):
    """What it makes in its place is whole."""
    spoil(stopped / "checkpoint-6" / file)
    with pytest.warns(UserWarning, match=f"checkpoint-6 is skipped: .*{said}"):
        train(str(checkpoint), stopped, TrainSettings(**options), resume=True)
    assert damage(stopped / "checkpoint-6") is None
    assert_same(stopped, whole[False][0])


@pytest.mark.filterwarnings("ignore:.*is skipped")
def test_without_a_whole_checkpoint_it_begins_again(stopped, checkpoint, options, whole):
    for step in (5, 6):
        (stopped / f"checkpoint-{step}" / MANIFEST).unlink()
    train(str(checkpoint), stopped, TrainSettings(**options), resume=True)
    assert_same(stopped, whole[False][0])


def test_what_a_kill_left_behind_is_cleared_away(stopped, checkpoint, options, whole):
    for name in (".checkpoint.parscale-working", ".parscale-working", "of-another-name"):
        (stopped / name).mkdir()
        (stopped / name / MARKER).touch()
        (stopped / name / "file").write_text("half")
    (stopped / ".run.json.parscale-working").mkdir()
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    train(str(checkpoint), stopped, TrainSettings(**options), resume=True)
    assert not (stopped / "of-another-name").exists()
    assert_same(stopped, whole[False][0])


def test_what_a_run_did_not_make_stays(stopped, checkpoint, options, whole, tmp_path):
    """Whatever it is called: as checkpoints are, as what parscale works with is, or what a link leads to."""
    (stopped / "checkpoint-6" / MANIFEST).unlink()
    elsewhere = tmp_path / "elsewhere"
    names = (".backup-20251128", ".savings", ".removing-soon", ".saving", "checkpoint-2", "checkpoint-4.old", "notes")
    for folder in (*(stopped / name for name in names), elsewhere):
        folder.mkdir()
        (folder / "thesis.txt").write_text("mine")
        (folder / "inside").mkdir()
    (stopped / ".parscale-link").symlink_to(elsewhere)
    with pytest.warns(UserWarning, match="it was renamed to") as warned:
        train(str(checkpoint), stopped, TrainSettings(**options), resume=True)
    for folder in (*(stopped / name for name in names), elsewhere, stopped / ".parscale-link"):
        assert (folder / "thesis.txt").read_text() == "mine"
        assert (folder / "inside").is_dir()
    (aside,) = stopped.glob("checkpoint-6-*")  # what was in the way and may be somebody's
    assert (aside / "optimizer.pt").exists()
    assert any(f"it was renamed to {aside}" in str(warning.message) for warning in warned)
    assert contents(stopped)[1] == whole[False][0][1]


@pytest.mark.parametrize(
    "part", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"]
)
def test_a_checkpoint_without_a_part_is_not_whole(stopped, part):
    """Also where its manifest agrees with what is there."""
    manifest = json.loads((stopped / "checkpoint-6" / MANIFEST).read_text())
    (stopped / "checkpoint-6" / part).unlink()
    del manifest["files"][part]
    (stopped / "checkpoint-6" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.warns(UserWarning, match="checkpoint-6 is skipped: it lacks the "):
        assert Run(stopped).newest_checkpoint() == stopped / "checkpoint-5"
    (stopped / "checkpoint-5" / part).unlink()
    with pytest.raises(RuntimeError, match="checkpoint-5 is an incomplete checkpoint: it lacks the "):
        write_manifest(stopped / "checkpoint-5")


def test_nothing_to_go_on_with_and_nothing_left_to_do(checkpoint, options, whole, tmp_path):
    """With resume a run starts, and a finished one is left as it is, also where other text is to be measured."""
    start, text = tmp_path / "start", tmp_path / "text.txt"
    shutil.copytree(checkpoint, start)
    text.write_text(Path(options["data"][0]).read_text())
    options = options | {"data": [str(text)]}
    first = train(str(start), tmp_path / "run", TrainSettings(**options), resume=True)
    assert not first["finished_before"]
    assert_same(tmp_path / "run", whole[False][0])
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    measured_on = {"eval_data": {"new": "gone.txt"}, "eval_tokens": 5}
    again = train(str(start), tmp_path / "run", TrainSettings(**options | measured_on), resume=True)
    assert again == first | {"finished_before": True}
    for changed, said in (
        ({"tokens": 2 * STEPS * 4 * 32}, "tokens was 768 and is 1536"),
        ({"learning_rate": 5.0}, "learning_rate was 0.01 and is 5.0"),
        ({"data": ["gone.txt"]}, "data was"),
        ({"seed": 1}, "seed was 0 and is 1"),
    ):
        with pytest.raises(ValueError, match=f"was started with other settings: .*{said}"):
            train(str(start), tmp_path / "run", TrainSettings(**options | changed), resume=True)
    for omitted, said in (("learning_rate", "learning_rate was 0.01 and is 3e-05"), ("tokens", "steps was 6 and is")):
        others = {name: value for name, value in options.items() if name != omitted}
        with pytest.raises(ValueError, match=f"was started with other settings: .*{said}"):
            train(str(start), tmp_path / "run", TrainSettings(**others), resume=True)
    with pytest.raises(ValueError, match=r"other settings: checkpoint was .* and is 'nope'"):
        train("nope", tmp_path / "run", TrainSettings(**options), resume=True)
    for path, said in ((text, "contents of data have"), (start / "config.json", "contents of checkpoint have")):
        before = path.read_text()
        path.write_text(("Something else. " if path is text else "\n") + before)
        with pytest.raises(ValueError, match=f"other settings: .*{said} changed"):
            train(str(start), tmp_path / "run", TrainSettings(**options), resume=True)
        path.write_text(before)
    assert train(str(start), tmp_path / "run", TrainSettings(**options), resume=True) == again
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rate": 1e-3}, r"learning_rate was 0.01 and is 0.001"),
        ({"tokens": 2 * STEPS * 4 * 32}, r"tokens was 768 and is 1536; steps was 6 and is 12"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"streaming": True}, "streaming was False and is True[.]$"),
        ({"eval_tokens": 5}, "eval_tokens was [0-9]+ and is 5[.]$"),
    ],
)
def test_other_settings_are_refused(stopped, checkpoint, options, changed, said):
    before = sorted(path.name for path in stopped.iterdir())
    with pytest.raises(ValueError, match=f"was started with other settings: .*{said}"):
        train(str(checkpoint), stopped, TrainSettings(**options | changed), resume=True)
    assert sorted(path.name for path in stopped.iterdir()) == before


def test_other_data_are_refused(stopped, checkpoint, options, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Something else. " * 300)
    with pytest.raises(ValueError, match=r"data was .*; data_digest was"):
        train(str(checkpoint), stopped, TrainSettings(**options | {"data": [str(other)]}), resume=True)


def test_the_same_files_by_other_names(stopped, checkpoint, options, whole, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    data = [os.path.relpath(name) for name in options["data"]]
    train(checkpoint.name, stopped, TrainSettings(**options | {"data": data}), resume=True)
    assert_same(stopped, whole[False][0])


def test_how_the_batch_is_divided_may_change(full, options, tmp_path):
    """The same sums in another order, where no dropout draws other numbers for other rows."""
    output = tmp_path / "run"
    train(str(full), output, TrainSettings(**options))
    expected, lines = contents(output)
    without_result(output)
    (output / "checkpoint-6" / MANIFEST).unlink()
    with pytest.warns(UserWarning, match="is skipped"):
        train(str(full), output, TrainSettings(**options | {"micro_batch_size": 4}), resume=True)
    found, again = contents(output)
    losses = [[line["loss"] for line in some if "loss" in line] for some in (lines, again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2**-7, atol=1e-5)  # one rounding to bfloat16


@pytest.mark.parametrize("kilobytes", sample([700, 1500], daily=[700]))
def test_a_full_disk(checkpoint, options, whole, tmp_path, kilobytes, programs):
    """A small file system of its own: a clear error, the last checkpoint whole, and all goes on when there is room."""
    disk, left = tmp_path / "disk", tmp_path / "left"
    disk.mkdir()
    chosen = options | {"keep_checkpoints": 100}
    code = (
        "from pathlib import Path\nfrom parscale.checkpoints import TrainSettings, train\n"
        f"try:\n    train({str(checkpoint)!r}, Path({str(disk / 'run')!r}), TrainSettings(**{chosen!r}))\n"
        "except OSError as error:\n    print('said:', error)\n"
    )
    done = programs.run(small_disk.__file__, disk, kilobytes, left, "-c", code, cwd=tmp_path)
    if done.returncode == small_disk.FORBIDDEN:
        pytest.skip("this machine lets nobody mount a file system")
    copy = left / "run"
    (said,) = (line for line in done.stdout.splitlines() if line.startswith("said:"))
    assert f"could not be written to {disk}/run, where " in said
    free = int(re.search(r"where ([\d,]+) bytes are free", said)[1].replace(",", ""))
    assert free < 300_000  # a checkpoint takes more
    assert "Free some space and continue with --resume" in said
    steps = Run(copy).steps()
    assert len(steps) < STEPS
    assert (f"{disk}/run/checkpoint-{max(steps)} is complete" if steps else "there is none before it") in said
    assert_readable(copy)
    with contextlib.suppress(FileNotFoundError):
        for path in copy.rglob("*.safetensors"):
            with safe_open(path, "pt") as file:
                assert list(file.keys())
    train(str(checkpoint), copy, TrainSettings(**chosen), resume=True)
    assert_same(copy, whole[False][0])


def test_a_folder_that_can_no_longer_be_written(backbone, options, tmp_path, monkeypatch):
    """That is no full disk, and is not called one."""
    with monkeypatch.context() as patched:
        refused = OSError(errno.EACCES, "Permission denied")
        patched.setattr(Run, "publish", lambda self, *args, **kwargs: (_ for _ in ()).throw(refused))
        with pytest.raises(OSError, match=r"\(Permission denied\); .* that can be written and continue"):
            train(str(backbone), tmp_path / "run", TrainSettings(**options))


FULL_DISKS = {
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "tokenizers": Exception("No space left on device (os error 28)"),  # of no type of its own
    "torch's writer": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    "torch's end": RuntimeError("basic_ios::clear: iostream error"),
    "the system": OSError(errno.ENOSPC, "No space left on device"),
}


@pytest.mark.parametrize("library", FULL_DISKS)
def test_a_full_disk_that_a_library_speaks_of(backbone, options, tmp_path, monkeypatch, library):
    """A plain model is written by transformers itself, and the error comes as the library raises it."""
    save, calls = transformers.modeling_utils.safe_save_file, []

    def fail_at_the_second(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise FULL_DISKS[library]
        return save(*args, **kwargs)

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", fail_at_the_second)
    with pytest.raises(OSError, match=r"after 2 steps could not be written .*checkpoint-1 is complete\. Free"):
        train(str(backbone), tmp_path / "run", TrainSettings(**options))
    assert Run(tmp_path / "run").steps() == [1]
    assert not list((tmp_path / "run").glob(".*"))


def test_the_disk_is_full_at_the_end(full, options, tmp_path, monkeypatch):
    """When the result is written: it is not there, and what goes on needs no step."""
    chosen = options | {"freeze_backbone": True, "save_every": 100}

    def fail(self, *args, **kwargs):
        raise Exception("No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr("parscale.checkpoints.training.run_result.plot_metrics", fail)
        with pytest.raises(OSError, match=r"The disk of .*run is full.* --resume; .*checkpoint-6"):
            train(str(full), tmp_path / "run", TrainSettings(**chosen))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "metrics.jsonl", "checkpoint-6"}
    assert not train(str(full), tmp_path / "run", TrainSettings(**chosen), resume=True)["finished_before"]
    load(tmp_path / "run")
