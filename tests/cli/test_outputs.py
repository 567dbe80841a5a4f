"""Outputs that cannot be written: one line before any work, and nothing changed on the disk."""

import errno
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from parscale import load
from parscale.checkpoints.training.run_folder import Run, damage
from parscale.cli.application import BAD_INPUT, run

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
SIZES = ["--sequence-length", "16", "--batch-size", "4", "--tokens", "512"]


def commands(backbone, two_sets, text_file, output):
    """Every command that writes, by what it writes."""
    return {
        "convert": ["convert", backbone, output, "--num-streams", 2],
        "train": ["train", two_sets, "--data", text_file, "--output", output, *SIZES],
        "resume": ["train", two_sets, "--data", text_file, "--output", output, *SIZES, "--resume"],
        "quickstart": ["quickstart", "--output", output],
        "sweep": ["law", "sweep", output],
        "eval": ["eval", two_sets, "--data", text_file, "--output", output],
        "diagnose": ["diagnose", two_sets, "--data", text_file, "--plot", output],
        "cost": ["cost", backbone, "--num-streams", 2, "--batch-size", 1, "--plot", output],
        "fit": ["law", "fit", "stack", "--plot", output],
        "plot": ["law", "plot", "stack", output],
    }


WRITES_A_FOLDER = ("convert", "train", "resume", "quickstart", "sweep")
OUTPUTS = {
    "a dangling link": (lambda path: path.symlink_to("nowhere"), "link to nowhere, which does not exist"),
    "a link in a circle": (lambda path: path.symlink_to(path.name), "which does not exist"),
    "a pipe": (os.mkfifo, "neither a folder nor a file|a device or a pipe"),
    "a device": (lambda path: path.symlink_to("/dev/null"), "neither a folder nor a file|a device or a pipe"),
    "a place for no files": (
        lambda path: path.symlink_to("/proc/sys") if path.suffix == "" else path.mkdir(),
        "Nothing was saved|is not empty|is a folder|holds no run",
    ),
}


@pytest.mark.parametrize("what", OUTPUTS)
@pytest.mark.parametrize("command", commands(*"abcd"))
def test_an_output_that_cannot_be(backbone, two_sets, text_file, tmp_path, monkeypatch, capsys, command, what):
    def too_late(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", too_late)
    folder = tmp_path / "outputs"
    folder.mkdir()
    output = folder / ("output" if command in WRITES_A_FOLDER else "output.png")
    make, said = OUTPUTS[what]
    make(output)
    arguments = commands(backbone, two_sets, text_file, output)[command]
    assert run([str(argument) for argument in arguments]) == BAD_INPUT
    printed = capsys.readouterr()
    assert re.search(said, printed.err), printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert os.listdir(folder) == [output.name]


@pytest.mark.parametrize("command", commands(*"abcd"))
def test_a_folder_that_cannot_be_written(backbone, two_sets, text_file, monkeypatch, capsys, command):
    """As on a disk that is mounted for reading, also for root."""
    mkdir = Path.mkdir

    def refuse(self, *args, **kwargs):
        if "sealed" in str(self):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    output = text_file.parent / "sealed.png"
    arguments = commands(backbone, two_sets, text_file, output)[command]
    assert run([str(argument) for argument in arguments]) == BAD_INPUT
    printed = capsys.readouterr()
    assert "Read-only file system" in printed.err
    assert str(output) in printed.err
    assert printed.err.count("\n") == 1
    assert not output.exists()


# -- full disks


def on_a_small_disk(folder, kilobytes, arguments):
    """Runs a command whose `DISK` is a file system of that size; returns how it ended, and what is left there."""
    disk, copy = folder / "disk", folder / "copy"
    disk.mkdir()
    copy.mkdir()
    enter = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*enter, "mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    words = " ".join(str(argument).replace("DISK", str(disk)) for argument in arguments)
    script = (
        f"mount -t tmpfs -o size={kilobytes}k tmpfs {disk} || exit 99\n"
        f"{sys.executable} -P -m parscale {words}; code=$?\ncp -a {disk}/. {copy}; exit $code"
    )
    done = subprocess.run([*enter, "sh", "-c", script], capture_output=True, text=True, env=ENVIRONMENT)
    return done, copy


def said(done):
    """The one line that a command has said; libraries say nothing when they are imported."""
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [40, *(pytest.param(size, marks=pytest.mark.nightly) for size in (4, 100))])
def test_a_conversion_to_a_full_disk(backbone, tmp_path, kilobytes):
    """Wherever it gets full: at the model, the configuration, the tokenizer or what the folder needs itself."""
    convert = ["convert", backbone, "DISK/model", "--num-streams", 2, "--prefix-length", 4, "--init", "random"]
    done, left = on_a_small_disk(tmp_path, kilobytes, convert)
    if done.returncode:
        assert done.returncode == BAD_INPUT, done.stderr
        assert re.fullmatch(r"parscale: \S+model: Nothing was saved: No space left.*free some space.*", said(done))
        assert not list(left.iterdir())
    else:
        load(left / "model")


# -- a terminal that closes


@pytest.mark.slow
def test_a_closed_terminal_loses_no_step(two_sets, text_file, tmp_path):
    """The run notices at its next step: the terminal is gone, and so is what it prints to."""
    output = tmp_path / "run"
    arguments = ["train", two_sets, "--data", text_file, "--output", output, "--save-every", 10_000]
    words = [*map(str, arguments), "--sequence-length", "16", "--batch-size", "4", "--tokens", "10M"]
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execve(sys.executable, [sys.executable, "-P", "-m", "parscale", *words], ENVIRONMENT)
    while not (output / "metrics.jsonl").exists():
        if select.select([terminal], [], [], 1)[0]:
            assert os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) not in (0, -signal.SIGHUP)
    (step,) = Run(output).steps()
    assert damage(Run(output).checkpoint(step)) is None
    assert Run(output).metrics()[-1]["step"] == step


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_conversion_that_is_stopped_leaves_nothing(backbone, tmp_path, programs, name):
    """A signal of its own, which does not come from a terminal."""
    script = (
        "import os, signal\nfrom transformers import LlamaForCausalLM\nfrom parscale.cli.application import run\n"
        "def stop(*args, **kwargs):\n"
        f"    os.kill(os.getpid(), signal.{name})\n    signal.pause()\n"
        "LlamaForCausalLM.save_pretrained = stop\n"
        f"raise SystemExit(run(['convert', {str(backbone)!r}, 'model', '--num-streams', '2', '--init', 'random']))\n"
    )
    done = programs.run("-P", "-c", script, cwd=tmp_path)
    assert done.returncode == 130, done.stderr
    assert said(done) == "parscale: interrupted."
    assert not list(tmp_path.iterdir())
