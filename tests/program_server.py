"""Runs Python programs that start at once: each is forked from this process, which has imported the large libraries.

Reads requests from standard input, one JSON object a line, and answers each with a line:

    start   what Python's command line holds after the interpreter: "-P", "-m" and a module, "-c" and code, or a script;
            with the working folder `cwd`, the `environment`, and the files `output` and `errors`. Answers the pid.
    wait    pids. Answers their exit codes, negative for signals, once all have ended. One that fails ends the others.

Nothing of parscale is imported here: what a program finds of it is its own.
"""

import atexit
import gc
import json
import os
import random
import runpy
import signal
import sys
import threading
import time
import types
from typing import Any, NoReturn

import accelerate  # noqa: F401
import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import scipy.stats  # noqa: F401
from transformers import (  # noqa: F401
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
)

LONGEST = 600  # seconds; a program that runs longer is ended


def forked(request: dict[str, Any]) -> int:
    """In the server the pid; in the new process 0, with folder, environment and files as the request says."""
    pid = os.fork()
    if pid:
        return pid
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    for number, name in enumerate((os.devnull, request["output"], request["errors"])):
        file = os.open(name, os.O_RDWR | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.alarm(LONGEST)
    random.seed()
    return 0


def ended(pids: list[int]) -> list[int]:
    """The exit codes of programs; when one fails, the others, which may wait for it, are ended."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            found, status = os.waitpid(pid, os.WNOHANG if len(pids) > 1 else 0)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
                for other in set(pids) - codes.keys() if codes[pid] else ():
                    os.kill(other, signal.SIGTERM)
        time.sleep(0.02 * (len(pids) > 1))
    return [codes[pid] for pid in pids]


def run_program(arguments: list[str]) -> None:
    """Does what Python does with its command line."""
    safe = arguments[0] == "-P"
    kind, *rest = arguments[safe:]
    if kind not in ("-m", "-c"):
        sys.argv[:] = [kind, *rest]
        sys.path.insert(0, os.path.dirname(kind))
        runpy.run_path(kind, run_name="__main__")
        return
    what, *rest = rest
    if not safe:
        sys.path.insert(0, os.getcwd() if kind == "-m" else "")
    sys.argv[:] = [kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), vars(sys.modules["__main__"]))


def end_of(arguments: list[str]) -> int:
    """Runs the program to its end; returns its exit code. An interruption ends it as in Python."""
    try:
        run_program(arguments)
    except SystemExit as end:
        if isinstance(end.code, int):
            return end.code
        if end.code is not None:
            print(end.code, file=sys.stderr)
            return 1
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


def leave(code: int) -> NoReturn:
    """Ends the process without the seconds that Python takes to take apart what it has imported."""
    threading._shutdown()  # waits for the threads, as Python does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


def serve() -> list[str]:
    """Answers requests until there are no more, or in a new process returns the program's arguments."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer: Any = ended(request["wait"])
        elif "poll" in request:
            found, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if found else None
        elif (answer := forked(request)) == 0:
            return request["start"]
        print(f"answer:{json.dumps(answer)}", flush=True)
    return []


del sys.path[0]  # this file's folder
gc.collect()
gc.freeze()  # what is here already is not looked at again in each process
atexit.register(gc.unfreeze)  # but taken away at its end, or nanobind (of Triton) reports it as leaked
program = serve()
leave(end_of(program) if program else 0)
