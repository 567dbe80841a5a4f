"""Outputs that cannot be written: one line before any work, and nothing changed on the disk."""

import errno
import os
import pty
import re
import select
import signal
from pathlib import Path

import pytest
import small_disk
from transformers import AutoModelForCausalLM

from parscale import load
from parscale.checkpoints.training.run_folder import Run, damage
from parscale.cli.application import BAD_INPUT, run

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


def on_a_small_disk(programs, folder, kilobytes, arguments):
    """Runs a command whose `DISK` is a file system of that size; returns how it ended, and what is left there."""
    disk, copy = folder / "disk", folder / "copy"
    disk.mkdir()
    words = [str(argument).replace("DISK", str(disk)) for argument in arguments]
    program = (small_disk.__file__, disk, kilobytes, copy, "-m", "parscale", *words)
    done = programs.run(*program, cwd=folder, PYTHONDONTWRITEBYTECODE="1")
    if done.returncode == small_disk.FORBIDDEN:
        pytest.skip("this machine lets nobody mount a file system")
    return done, copy


def said(done):
    """The one line that a command has said; libraries say nothing when they are imported."""
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [40, *(pytest.param(size, marks=pytest.mark.nightly) for size in (4, 100))])
def test_a_conversion_to_a_full_disk(backbone, tmp_path, kilobytes, programs):
    """Wherever it gets full: at the model, the configuration, the tokenizer or what the folder needs itself."""
    convert = ["convert", backbone, "DISK/model", "--num-streams", 2, "--prefix-length", 4, "--init", "random"]
    done, left = on_a_small_disk(programs, tmp_path, kilobytes, convert)
    if done.returncode:
        assert done.returncode == BAD_INPUT, done.stderr
        assert re.fullmatch(r"parscale: \S+model: Nothing was saved: No space left.*free some space.*", said(done))
        assert not list(left.iterdir())
    else:
        load(left / "model")


# -- a terminal that closes


IN_A_TERMINAL = """
import fcntl, os, runpy, sys, termios

os.setsid()
terminal = os.open(sys.argv[1], os.O_RDWR)
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
for number in range(3):
    os.dup2(terminal, number)
os.close(terminal)
sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
sys.argv[:] = ["parscale", *sys.argv[2:]]
runpy.run_module("parscale", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_closed_terminal_loses_no_step(two_sets, text_file, tmp_path, programs):
    """The run notices at its next step: the terminal is gone, and so is what it prints to."""
    output = tmp_path / "run"
    arguments = ["train", two_sets, "--data", text_file, "--output", output, "--save-every", 10_000]
    arguments += ["--sequence-length", "16", "--batch-size", "4", "--tokens", "10M"]
    terminal, end = pty.openpty()  # what a person sees, and what the program has of it
    command = ("-P", "-c", IN_A_TERMINAL, os.ttyname(end), *arguments)
    program = programs.start(*command, cwd=tmp_path, PYTHONDONTWRITEBYTECODE="1")
    while not (output / "metrics.jsonl").exists():
        assert program.is_running(), program.stderr
        if select.select([terminal], [], [], 1)[0]:
            assert os.read(terminal, 4096)
    for side in (end, terminal):
        os.close(side)
    assert program.wait() not in (0, -signal.SIGHUP)
    (step,) = Run(output).steps()
    assert damage(Run(output).checkpoint(step)) is None
    assert Run(output).metrics()[-1]["step"] == step


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.nightly)])
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
