"""Text that others wrote, on its way to a terminal: names in files, errors, warnings, progress, what a model writes."""

import io
import json
import logging
import re
import sys
import warnings
from contextlib import contextmanager

import pytest
import torch
import typer
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file, save_file

from parscale.cli import application
from parscale.cli.application import main, run
from parscale.cli.output import print_figures, print_json, waiting
from parscale.terminal.console import Terminal
from parscale.terminal.text import EscapingStream, escape_controls, escaping_streams

# A colour, a title of the window, an erased screen, a bell, a begun line, what turns the order of letters around, ...
HOSTILE = ["\x1b[31m", "\x1b]0;title\x07", "\x1b[2J", "\b", "\r", "\x9b31m", "\x7f", "\0", "\u202e", "\u2066", "\u200f"]
HOSTILE += ["\u2028", "\ufeff", "\u200b", "\U000e0041"]
OBEYED = re.compile("[^\t\n\x20-\x7e\xa0-\u0619\u061d-\u200a\u2010-\u2027\u202f-\u205f\u2070-\ud7ff\ue000-\ufefe]")


def has_only_text(printed):
    return OBEYED.search(printed) is None


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def test_a_letter_that_an_encoding_lacks_is_escaped(monkeypatch):
    """As Python does on standard error; a file on Windows may have such an encoding."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    with escaping_streams():
        print("x = '\u03c0\u00e9'")
        sys.stdout.flush()
    assert written.getvalue() == b"x = '\\u03c0\xe9'\n"


@contextmanager
def terminal(monkeypatch):
    """In this block standard output and standard error are one terminal."""
    stream = Screen()
    with monkeypatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        yield stream


def text_of(screen):
    """What was written but for the sequences by which rich colours and redraws lines."""
    return re.sub(r"\x1b\[(\?25[lh]|[0-9;]*m|[0-9]*[AK])|\r", "", screen.getvalue())


@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_what_a_terminal_obeys_is_an_escape(hostile):
    text = escape_controls(f"a{hostile}b")
    assert has_only_text(text)
    assert text.startswith("a\\")
    assert escape_controls(text) == text
    assert text.encode().decode("unicode_escape") == f"a{hostile}b"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain\ttext\n",
        "żółć",
        "日本語",
        "עברית",
        "👩\u200d👧",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "[red]",
    ],
)
def test_text_is_left_as_it_is(text):
    assert escape_controls(text) == text


def test_half_a_character_is_an_escape():
    assert escape_controls("a\udc80\ud800") == "a\\udc80\\ud800"


# -- the ways to a terminal


WAYS = {
    "an error": lambda text: run(["info", f"/no/{text}"]),
    "wrong usage": lambda text: run(["info", "a", f"b{text}"]),
    "figures": lambda text: print_figures({f"name{text}": f"value{text}", "inner": {f"name{text}": [f"value{text}"]}}),
    "figures as JSON": lambda text: print_json({f"name{text}": f"value{text}"}),
    "print": lambda text: print(f"a{text}b"),
    "print of errors": lambda text: print(f"a{text}b", file=sys.stderr),
    "echo": lambda text: typer.echo(f"a{text}b"),
    "lines": lambda text: sys.stdout.writelines([f"a{text}b"]),
    "a table": lambda text: Terminal().print(table(text)),
    "a status": lambda text: wait(text),
    "a warning": lambda text: application._show_warning(UserWarning(f"a{text}b"), UserWarning),
    "a warning of a library": lambda text: warnings.warn_explicit(f"a{text}b", UserWarning, f"{text}.py", 1),
    "a library's log": lambda text: logging.StreamHandler().emit(logging.makeLogRecord({"msg": f"a{text}b"})),
}


def test_a_progress_bar(monkeypatch):
    with terminal(monkeypatch) as screen:
        for hostile in HOSTILE:
            assert list(track([1], description=f"a{hostile}b", console=Terminal())) == [1]
    assert has_only_text(text_of(screen))


def table(text):
    table = Table(f"column{text}", title=f"title{text}")
    table.add_row(f"cell{text}")
    return table


def wait(text):
    with waiting(f"Loading {text}b"):
        pass


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_nothing_reaches_a_terminal_that_it_obeys(monkeypatch, way):
    """On a terminal, where rich colours, and by each way that a command has."""
    with warnings.catch_warnings(), terminal(monkeypatch) as screen:
        warnings.simplefilter("always")
        for hostile in HOSTILE:
            with escaping_streams():
                warnings.showwarning = application._show_warning
                way(hostile)
    printed = text_of(screen)
    assert has_only_text(printed), ascii(printed)
    assert "\\x1b[31m" in printed or "\\u001b[31m" in printed


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_names_are_no_markup(monkeypatch, way):
    with terminal(monkeypatch) as screen, escaping_streams(), warnings.catch_warnings():
        warnings.showwarning = application._show_warning
        warnings.simplefilter("always")
        way("[red]x[/red]:skull:[/]\\")
    assert "[red]x[/red]:skull:[/]" in re.sub(r"\s", "", text_of(screen)).replace("│", "")


def test_an_error_of_the_program_shows_its_text(monkeypatch):
    def broken(arguments):
        raise RuntimeError("a\x1b[31mb")

    monkeypatch.setattr(application, "run", broken)
    with terminal(monkeypatch) as screen, pytest.raises(SystemExit) as caught:
        main(["info"])
    assert caught.value.code == 1
    assert "RuntimeError: a\\x1b[31mb" in screen.getvalue()
    assert has_only_text(screen.getvalue())


def test_a_traceback_that_was_asked_for(monkeypatch):
    with terminal(monkeypatch) as screen:
        assert run(["--traceback", "info", "/no/\x1b[31m"]) == 2
    assert "Traceback" in screen.getvalue()
    assert has_only_text(screen.getvalue())


def test_progress_bars_of_libraries_still_work(monkeypatch):
    from tqdm import tqdm

    with terminal(monkeypatch) as screen, escaping_streams():
        for _ in tqdm(range(2), desc="outer"):
            for _ in tqdm(range(2), desc="inner"):
                pass
    assert "\r" in screen.getvalue()
    assert "\\" not in screen.getvalue()


def test_the_stream_is_otherwise_the_one_given():
    stream = EscapingStream(Screen())
    assert stream.isatty()
    assert stream.encoding == "utf-8"
    assert stream.write("a\x1b") == 2
    assert stream.getvalue() == "a\\x1b"


# -- names in checkpoints


@pytest.fixture
def named(two_sets, tmp_path):
    """A checkpoint whose names are hostile wherever a name is free."""
    import shutil

    folder = shutil.copytree(two_sets, tmp_path / "a\x1b[31m\u202eb")
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"architectures": ["Bert\x1b[31mFor\u202eX"], "parscale_sets": ["other"]}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_info(named, monkeypatch):
    with terminal(monkeypatch) as screen:
        assert run(["info", str(named)]) == 0
    assert has_only_text(screen.getvalue())
    assert "Bert\\x1b[31mFor\\u202eX" in screen.getvalue()


@pytest.mark.parametrize("command", [["info"], ["generate", "--prompt", "x"], ["eval", "--data", "TEXT"]], ids=str)
def test_tensors_and_fields(named, text_file, monkeypatch, command):
    path = named / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"extra\x1b[31m\u202e": torch.ones(1)}, path, metadata={"format": "pt"})
    fields = json.loads((named / "config.json").read_text())
    (named / "config.json").write_text(json.dumps(fields | {"architectures": None, "parscale_sets": ["\x1b[31m"]}))
    arguments = [str(text_file) if argument == "TEXT" else argument for argument in command]
    with terminal(monkeypatch) as screen:
        assert run([arguments[0], str(named), *arguments[1:]]) == 2
    assert has_only_text(text_of(screen))
    (named / "config.json").write_text(json.dumps(fields | {"architectures": None}))
    with terminal(monkeypatch) as screen:
        assert run([arguments[0], str(named), *arguments[1:]]) == (0 if command == ["info"] else 2)
    assert has_only_text(text_of(screen))
    assert command == ["info"] or "extra\\x1b[31m\\u202e is unknown" in screen.getvalue()


# -- what a model writes


@pytest.mark.parametrize("is_terminal", [True, False], ids=["terminal", "pipe"])
def test_generated_text(backbone, monkeypatch, is_terminal):
    """A pipe gets the text as it is; a terminal is shown it, with its lines and tabs."""
    stream = Screen() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    prompt = "a\x1b[31mb\n\tc\u202e"
    assert run(["generate", str(backbone), "--prompt", prompt, "--max-new-tokens", "1", "--device", "cpu"]) == 0
    if is_terminal:
        assert stream.getvalue().startswith("a\\x1b[31mb\n\tc\\u202e")
    else:
        assert stream.getvalue().startswith(prompt)
