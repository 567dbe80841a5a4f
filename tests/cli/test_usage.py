"""What every command has in common: help, one line for a mistake, exit codes."""

import json
import math
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from safetensors import SafetensorError

from parscale.cli import application
from parscale.cli.application import run
from parscale.cli.options import repeat_list_options
from parscale.cli.output import print_json

COMMANDS = {"quickstart", "convert", "info", "generate", "eval"}

OUT_OF_MEMORY = "Out of memory; choose fewer streams, shorter texts or a smaller batch, or a device with more memory."


def parscale(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "parscale", *arguments], cwd=cwd, capture_output=True, text=True)


def test_help_lists_the_commands(tmp_path):
    result = parscale("--help", cwd=tmp_path)
    assert result.returncode == 0
    assert all(f" {command} " in result.stdout for command in COMMANDS)


def test_no_argument_shows_the_help(capsys):
    assert run([]) == 0
    assert "convert" in capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_each_command_has_help(command, capsys):
    assert run([command, "--help"]) == 0
    assert f"parscale {command}" in capsys.readouterr().out


def test_version(capsys):
    import parscale

    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"parscale {parscale.__version__}\n"


def test_help_imports_nothing_that_takes_long(tmp_path):
    """It is there at once: half a second is promised, and torch alone takes longer."""
    script = (
        "import sys; from parscale.cli.application import run\n"
        "assert run(['--help']) == 0\n"
        "print('imported:', *(name.partition('.')[0] for name in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    imported = result.stdout.partition("imported:")[2].split()
    assert "parscale" in imported
    assert not {"torch", "transformers", "numpy", "scipy", "matplotlib", "datasets", "accelerate"} & {*imported}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["info"], "Missing argument"),
        (["info", "a", "b"], "unexpected extra argument"),
        (["convert", "a", "b"], "Missing option '--num-streams'"),
        (["convert", "a", "b", "--num-streams", "many"], "'--num-streams'"),
        (["convert", "a", "b", "--streams", "4"], "No such option: --streams"),
        (["generate", "a", "--prompt", "x", "--max-new-tokens", "0"], "'--max-new-tokens'"),
        (["generate", "a", "--prompt", "x", "--temperature", "-1"], "'--temperature'"),
        (["generate", "a", "--prompt", "x", "--temperature", "1e-45"], "1e-45 is not 0 or a number from 0.001 on"),
        (["generate", "a", "--prompt", "x", "--temperature", "nan"], "'--temperature'"),
        (["generate", "a", "--prompt", "x", "--temperature", "inf"], "inf is not 0 or a number from 0.001 on"),
        (["eval", "a"], "Give either --data FILE... or --tasks NAME..., not both"),
        (["eval", "a", "--data", "b", "--tasks", "c"], "Give either --data FILE... or --tasks NAME..., not both"),
        (["eval", "a", "--data", "b", "--limit", "3"], "Only --tasks takes --limit"),
        (["eval", "a", "--data"], "Option '--data' requires an argument"),
    ],
)
def test_wrong_usage_is_one_line(arguments, complaint, capsys):
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("parscale: ")
    assert complaint in printed.err
    assert "--help'" in printed.err


@pytest.mark.parametrize(
    "arguments", [["eval", "a", "--data", "b"], ["diagnose", "a", "--data", "b"], ["generate", "a", "--prompt", "b"]]
)
def test_what_runs_on_one_device_is_refused_in_several_processes(arguments, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert f"parscale {arguments[0]} runs in one process on one device, and WORLD_SIZE is 8" in printed.err
    assert ("lm-eval" in printed.err) is (arguments[0] == "eval")
    for one in ("1", ""):
        monkeypatch.setenv("WORLD_SIZE", one)
        assert run(arguments) == 2
        said = capsys.readouterr().err
        assert "WORLD_SIZE" not in said
        assert "int()" not in said


def broken(error: BaseException) -> None:
    raise error


@pytest.fixture
def command(monkeypatch):
    """A command line whose only command is the function that it is given."""

    def install(name: str, function: Callable[[], None]) -> None:
        own_app = typer.Typer()
        own_app.callback()(application.common)
        own_app.command(name)(function)
        monkeypatch.setattr(application, "app", own_app)

    return install


@pytest.fixture
def failing(command):
    """A command line whose only command raises what it is given."""
    return lambda error: command("fail", lambda: broken(error))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("too\n  many\nstreams"), "too many streams"),
        (OSError("no such\nmodel"), "no such model"),
        (OSError(28, "No space left on device", "a/b"), "a/b: No space left on device."),
        (SafetensorError("HeaderTooLarge"), "HeaderTooLarge"),
        (ValueError(), "ValueError"),
        (MemoryError(), OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), f"{OUT_OF_MEMORY} (CUDA out of memory. Tried)"),
        (RuntimeError("can't allocate memory"), f"{OUT_OF_MEMORY} (can't allocate memory)"),
        (RuntimeError("Storage size calculation overflowed"), f"{OUT_OF_MEMORY} (Storage size calculation overflowed)"),
    ],
)
def test_bad_input_is_one_line(error, line, failing, capsys):
    failing(error)
    assert run(["fail"]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"parscale: {line}\n"
    assert printed.out == ""


def test_traceback_on_request(failing, capsys):
    failing(ValueError("too many"))
    assert run(["--traceback", "fail"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_the_program_keeps_its_traceback(failing):
    failing(KeyError("a fault"))
    with pytest.raises(KeyError, match="a fault"):
        run(["fail"])


def test_a_warning_is_one_line(capsys, command):
    command("warn", lambda: warnings.warn("mind\n the gap", stacklevel=1))
    assert run(["warn"]) == 0
    assert capsys.readouterr().err == "parscale: warning: mind the gap\n"


def test_interrupted(failing, capsys):
    failing(KeyboardInterrupt())
    assert run(["fail"]) == 130
    assert capsys.readouterr().err == "parscale: interrupted.\n"


@pytest.fixture
def handlers():
    """Signals are handled after the test as before it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_signals_are_handled_as_before_once_a_command_has_ended(command):
    command("work", lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    assert run(["work"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("handlers")
def test_a_signal_that_is_ignored_ends_nothing(command):
    """As under `nohup`."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    command("work", lambda: signal.raise_signal(signal.SIGHUP))
    assert run(["work"]) == 0


@pytest.mark.usefixtures("handlers")
def test_a_second_signal_interrupts_no_cleaning_up(command):
    cleaned = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGHUP)
            cleaned.append(True)

    command("work", work)
    assert run(["work"]) == 130
    assert cleaned


def test_numbers_that_json_does_not_have_are_null(capsys):
    print_json({"losses": [math.inf, -math.inf, math.nan, 1.0]})
    assert json.loads(capsys.readouterr().out) == {"losses": [None, None, None, 1.0]}


def test_a_reader_that_has_gone_is_no_error(tmp_path):
    command = f"{sys.executable} -m parscale --help | head -c 1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert result.stderr == ""
    assert result.stdout[1:] == "0\n"


@pytest.mark.parametrize("arguments", ["--version", "convert nowhere output --num-streams 2"])
def test_a_closed_output_is_one_line_before_any_work(arguments, tmp_path):
    command = f"{sys.executable} -m parscale {arguments} >&-"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    line = "parscale: Standard output is closed: redirect it to a file, or to /dev/null.\n"
    assert (result.returncode, result.stderr) == (2, line)
    result = subprocess.run(["bash", "-c", f"{command} 2>&-"], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "")


class Parameter:
    def __init__(self, names: list[str], *, multiple: bool = False, is_flag: bool = False) -> None:
        self.opts = names
        self.secondary_opts: list[str] = []
        self.multiple = multiple
        self.is_flag = is_flag
        self.param_type_name = "option" if names[0].startswith("-") else "argument"


PARAMETERS = [
    Parameter(["checkpoint"]),
    Parameter(["--data", "-d"], multiple=True),
    Parameter(["--size"]),
    Parameter(["--json"], is_flag=True),
]


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        ("C --data a b c", "C --data a --data b --data c"),
        ("C --data a b --size 3 --json", "C --data a --data b --size 3 --json"),
        ("C -d a b", "C -d a -d b"),
        ("C --data=a b", "C --data=a --data b"),
        ("--data a C", "--data a C"),
        ("--data a C b", "--data a C --data b"),
        ("--size 3 C --data a b", "--size 3 C --data a --data b"),
        ("--json C --data a", "--json C --data a"),
        ("C --json b", "C --json b"),
        ("C --data a -- b", "C --data a -- b"),
        ("C --data -", "C --data -"),
        ("C --data a -", "C --data a --data -"),
        ("C --unknown x", "C --unknown x"),
        ("C --data", "C --data"),
    ],
)
def test_list_options_take_several_values(given, understood):
    assert repeat_list_options(given.split(), PARAMETERS) == understood.split()
