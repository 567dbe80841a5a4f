"""The application: its commands, and the handling of errors."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Annotated

import typer

from parscale import __version__
from parscale.cli.convert import convert
from parscale.cli.cost import cost
from parscale.cli.diagnose import diagnose
from parscale.cli.evaluate import evaluate
from parscale.cli.export import export
from parscale.cli.generate import generate
from parscale.cli.info import info
from parscale.cli.law import app as law
from parscale.cli.options import ListOptionCommand
from parscale.cli.push import push
from parscale.cli.quickstart import quickstart
from parscale.cli.train import train
from parscale.terminal.text import escape_controls, escaping_streams

app = typer.Typer(
    name="parscale",
    help="Parallel streams for Hugging Face models.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "convert": convert,
    "train": train,
    "info": info,
    "generate": generate,
    "eval": evaluate,
    "diagnose": diagnose,
    "export": export,
    "push": push,
    "cost": cost,
}
for name, command in COMMANDS.items():
    app.command(name, cls=ListOptionCommand)(command)
app.add_typer(law, name="law")

# transformers imports the first two if they are installed, whether a command needs them or not.
SAY_MUCH_WHEN_IMPORTED = ("bitsandbytes", "torchao", "torch.utils._pytree")
SHOW_TRACEBACK = "--traceback"
BAD_INPUT = 2
INTERRUPTED = 130


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"parscale {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
    traceback: Annotated[
        bool, typer.Option(SHOW_TRACEBACK, help="Show the traceback of an error, not only its message.")
    ] = False,
) -> None:
    """Takes the options that come before a command; `run` reads `--traceback` itself."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits with its exit code: 0, 2 for bad input, 130 when interrupted.

    Bad input is reported as one line on standard error. Any other exception is a bug in the program and keeps its
    traceback.
    """
    try:
        code = run(sys.argv[1:] if arguments is None else list(arguments))
    except Exception:
        sys.stderr.write(escape_controls(traceback.format_exc()))
        code = 1
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """As `main`, but returns the exit code."""
    if sys.stdout is None:  # closed by the caller, as in `parscale info CHECKPOINT >&-`
        print("parscale: Standard output is closed: redirect it to a file, or to /dev/null.", file=sys.stderr)
        return BAD_INPUT
    with escaping_streams():
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    try:
        for library in SAY_MUCH_WHEN_IMPORTED:
            logging.getLogger(library).setLevel(logging.ERROR)
        with _ended_by_signals(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            warnings.simplefilter("ignore", FutureWarning)  # meant for developers that call these libraries
            # Without "standalone", typer returns its own errors and does not print them over several lines.
            command = typer.main.get_command(app)
            code = command.main(arguments or ["--help"], prog_name="parscale", standalone_mode=False)
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except (BrokenPipeError, SystemExit) as ended:
        if isinstance(ended, SystemExit) and not isinstance(ended.__context__, BrokenPipeError):  # which click makes it
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader, such as `head`, has exited
        return 0
    except Exception as error:
        line = _bad_input(error)
        if line is None:
            raise
        if SHOW_TRACEBACK in arguments[:1]:
            traceback.print_exc()
        print(f"parscale: {line}", file=sys.stderr)
        return BAD_INPUT
    if code == INTERRUPTED:
        with contextlib.suppress(OSError):  # the terminal may be closed
            print("parscale: interrupted.", file=sys.stderr)
    return code if isinstance(code, int) else 0


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """In this block SIGTERM and SIGHUP stop a command as Ctrl-C does, so that no incomplete file is left."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []

    def end(number: int, frame: FrameType | None) -> None:
        for later in numbers:  # a closing terminal sends several
            signal.signal(later, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bad_input(error: Exception) -> str | None:
    """A one-line message for the user; None if the error is not the user's."""
    if hasattr(error, "format_message"):  # typer's usage errors; the class is not the same in all versions
        message = " ".join(str(error.format_message()).split())
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "parscale"
        return f"{message.rstrip('.')}. Try '{command} --help'."
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}."
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError)) or type(error).__name__ == "SafetensorError":
        return text or type(error).__name__
    if _is_out_of_memory(error, text):
        said = f" ({text})" if text else ""
        return (
            "Out of memory; choose fewer streams, shorter texts or a smaller batch, or a device with more memory."
            f"{said}"
        )
    return None


def _is_out_of_memory(error: Exception, text: str) -> bool:
    """Whether the memory of the machine or of a device is used up; torch's error for a CPU has no class of its own."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # without an import of torch
        return True
    return isinstance(error, RuntimeError) and any(
        said in text for said in ("allocate memory", "enough memory", "Storage size calculation overflowed")
    )


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    print(f"parscale: warning: {' '.join(str(message).split())}", file=sys.stderr)
