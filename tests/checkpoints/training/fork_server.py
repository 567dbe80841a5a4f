"""Training runs in processes that start at once, and that a test kills: forked from one that has imported everything.

Takes a checkpoint as its first argument, which it loads once, so that what transformers does the first time is done.
Calls the port of this machine that is its second argument, reads requests from there, one JSON object a line, and
answers each with a line: how the process ended.

    checkpoint, output, settings, resume   for `parscale.checkpoints.training.train.train`
    signal                                 a signal to send
    after                                  after how many seconds
    at                                     or in place of that: at which file operation in the output folder
    count                                  answer with the number of such operations
"""

import gc
import json
import os
import signal
import socket
import sys
import time
import traceback

import peft  # noqa: F401
import scipy.stats  # noqa: F401
import torch  # noqa: F401
from transformers import Trainer, TrainingArguments  # noqa: F401

from parscale import load
from parscale.checkpoints.training.train import TrainSettings, train

INTERRUPTED = 130
WATCHED = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.scandir", "os.listdir"}


def run(request):
    count = 0
    place = os.path.abspath(request["output"])

    def watch(event, arguments):
        nonlocal count
        if event not in WATCHED or not arguments or not isinstance(arguments[0], (str, bytes, os.PathLike)):
            return
        path = os.fspath(arguments[0])
        path = path.decode() if isinstance(path, bytes) else path
        if os.path.abspath(path).startswith(place):
            count += 1
            if count == request.get("at"):
                os.kill(os.getpid(), getattr(signal, request["signal"]))

    if "at" in request or "count" in request:
        sys.addaudithook(watch)
    from pathlib import Path

    try:
        train(
            request["checkpoint"],
            Path(request["output"]),
            TrainSettings(**request["settings"]),
            resume=request["resume"],
        )
    except KeyboardInterrupt:
        return INTERRUPTED, count
    return 0, count


def serve(request):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code, count = run(request)
            os.write(writing, str(count).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    if "after" in request:
        time.sleep(request["after"])
        os.kill(child, getattr(signal, request["signal"]))
    _, status = os.waitpid(child, 0)
    answer = {"code": os.waitstatus_to_exitcode(status), "count": int(os.read(reading, 20) or 0)}
    os.close(reading)
    return answer


signal.alarm(0)  # it lasts as long as the tests that ask
os.fsync = lambda descriptor: None  # what a killed process has written is there, also before it is on the disk
load(sys.argv[1])
gc.collect()
gc.freeze()  # what is here already is not looked at again in each process
with socket.create_connection(("127.0.0.1", int(sys.argv[2]))) as line, line.makefile("w") as answers:
    for request in line.makefile("r"):
        print(json.dumps(serve(json.loads(request))), file=answers, flush=True)
