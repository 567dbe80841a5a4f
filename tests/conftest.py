"""A tokenizer of single bytes, a tiny checkpoint with it, and programs that start at once, for all tests.

Imports stand inside: what this module imports, pytest's controlling process does too, and prints when all is over.
"""

import atexit
import functools
import gc
import itertools
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def covering(cases: list[set[Any]]) -> set[int]:
    """Which cases to take so that every value of any of them is met: each time the one with the most that are new."""
    open_values, taken = set().union(*cases), set[int]()
    while open_values:
        best = max(range(len(cases)), key=lambda number: len(cases[number] & open_values))
        taken.add(best)
        open_values -= cases[best]
    return taken


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves to the night what meets no new value of a parameter, in tests that are marked as grids."""
    grids: dict[str, list[Any]] = {}
    for item in items:
        if item.get_closest_marker("grid") and not item.get_closest_marker("nightly"):
            grids.setdefault(item.nodeid.split("[")[0], []).append(item)
    for cells in grids.values():
        daily = covering([{(name, id(value)) for name, value in cell.callspec.params.items()} for cell in cells])
        for number, cell in enumerate(cells):
            if number not in daily:
                cell.add_marker(pytest.mark.nightly)


def pytest_collection_finish() -> None:
    """Garbage is not looked for in what is imported by now; training does that at the end of each run."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or nanobind (of Triton) reports it as leaked


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Begins each test, its fixtures too, with the same random numbers: which tests ran before it changes nothing."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


class Programs:
    """Starts Python programs from one process that has imported the large libraries; see `program_server.py`.

    Args:
        folder: for what the programs print.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.numbers = folder, itertools.count()
        self.errors = folder / "server"
        self.environment = os.environ | {
            "HF_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        with self.errors.open("w") as errors:
            self.server = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("program_server.py")],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, **request: Any) -> Any:
        """The server's answer."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        while not (line := self.server.stdout.readline()).startswith("answer:"):
            assert line, self.errors.read_text()
        return json.loads(line.removeprefix("answer:"))

    def start(self, *arguments: object, cwd: Path, **environment: str) -> "Program":
        """Starts a program.

        Args:
            arguments: of Python's command line, after the interpreter.
            cwd: the folder that it starts in.
            environment: beside this process's. What libraries read of it when they are imported is set already: they
                ask no hub, and have an empty home.
        """
        number = next(self.numbers)
        files = [self.folder / f"{number}.{kind}" for kind in ("output", "errors")]
        for file in files:
            file.touch()
        output, errors = files
        pid = self.ask(
            start=[str(argument) for argument in arguments],
            cwd=str(cwd),
            environment=self.environment | environment,
            output=str(output),
            errors=str(errors),
        )
        return Program(self, pid, output, errors)

    def run(self, *arguments: object, cwd: Path, **environment: str) -> "Program":
        """Starts a program and waits for its end."""
        program = self.start(*arguments, cwd=cwd, **environment)
        program.wait()
        return program

    def run_together(self, number: int, *arguments: object, cwd: Path, **environment: str) -> None:
        """Runs as many processes as `torchrun --nproc-per-node` would start, and asserts that all succeed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(number)]
        programs = [
            self.start(*arguments, cwd=cwd, **environment | {name: str(value) for name, value in own.items()})
            for own in variables
        ]
        codes = self.ask(wait=[program.pid for program in programs])
        errors = "\n".join(program.stderr[-5000:] for program in programs)
        assert codes == [0] * number, errors


class Program:
    """A program that was started: how it ended, and what it printed."""

    def __init__(self, programs: Programs, pid: int, output: Path, errors: Path) -> None:
        self.programs, self.pid, self.output, self.errors = programs, pid, output, errors
        self.returncode: int | None = None

    def is_running(self) -> bool:
        """Whether the program has not ended yet."""
        if self.returncode is None:
            self.returncode = self.programs.ask(poll=self.pid)
        return self.returncode is None

    def wait(self) -> int:
        """The exit code, negative for a signal, once the program has ended."""
        if self.returncode is None:
            (self.returncode,) = self.programs.ask(wait=[self.pid])
        assert self.returncode is not None
        return self.returncode

    @property
    def stdout(self) -> str:
        return self.output.read_text()

    @property
    def stderr(self) -> str:
        return self.errors.read_text()


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """Python programs in processes of their own, without the seconds that importing torch and transformers takes."""
    programs = Programs(tmp_path_factory.mktemp("programs"))
    yield programs
    assert programs.server.stdin is not None
    programs.server.stdin.close()
    programs.server.wait()


@pytest.fixture(scope="module")
def unflushed() -> Iterator[None]:
    """No file waits for the disk, as about a hundred do in each run; only a loss of power could tell the difference."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def brief_lm_eval() -> Iterator[None]:
    """lm-eval reads each of its thousands of task files once, and describes the machine once, not at each run."""
    from lm_eval.tasks import _index
    from torch.utils import collect_env

    load, found = _index.load_yaml, {}

    def load_once(path: Path, **options: Any) -> Any:
        if Path(_index.__file__).parent not in path.parents:
            return load(path, **options)
        key = (path, *options.items())
        if key not in found:
            found[key] = load(path, **options)
        return found[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_index, "load_yaml", load_once)
        patched.setattr(collect_env, "get_pretty_env_info", functools.cache(collect_env.get_pretty_env_info))
        yield


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """One token for each byte, and the end of text as number 256."""
    from byte_tokenizers import tokenizer_of_bytes

    return tokenizer_of_bytes()


@pytest.fixture(scope="session")
def backbone(byte_tokenizer, tmp_path_factory) -> Path:
    """A Llama of two layers in bfloat16 and a tokenizer of single bytes; tests only read it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "backbone"
    byte_tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=byte_tokenizer.eos_token_id,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder
