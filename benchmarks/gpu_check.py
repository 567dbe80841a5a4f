"""Every figure that needs a GPU, the most valuable first, in as many minutes as are given: decoding with a 1.8B-shaped
model, each kernel against its floor, exactness at full size, what a training step costs beside the plain backbone's,
and vLLM where it is installed.

Each part runs in a process of its own, which has a limit: a kernel that fails or hangs on the device takes nothing else
with it. Each figure is written as it comes, so that a run that is cut short leaves those it has found; a file that an
earlier run has left is renamed.

    python benchmarks/gpu_check.py --output benchmarks/results/gpu.json
    python benchmarks/gpu_check.py --released FOLDER   # the released code's decoding step beside it
    python benchmarks/gpu_check.py --only serving --minutes 9
    python benchmarks/gpu_check.py --dry-run           # tiny sizes on the CPU, the figures mean nothing

A floor is the larger of two times: the bytes that must move, each input read and each output written once, at the
measured bandwidth of a copy; and the operations, two for each multiplication with its addition, at the measured rate of
a large bfloat16 product. `of_floor` is the floor's time over the measured one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_kernels
import gpu_models
import gpu_serving
import torch
from gpu_bench import Bench, Row, versions

GRACE = 20  # seconds that a part has after its limit, for the figure that it is at


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of the figures.

    Attributes:
        run: adds them.
        seconds: its limit, after which it begins no further figure.
    """

    run: Callable[[Bench], None]
    seconds: float


PARTS = {  # in this order
    "ceilings": Part(gpu_kernels.ceilings, 30),
    "decoding": Part(gpu_models.decoding, 150),
    "attention": Part(gpu_kernels.attention, 40),
    "mixing": Part(gpu_kernels.mixing, 40),
    "exactness": Part(gpu_kernels.exactness, 60),
    "prefill": Part(gpu_kernels.prefill, 30),
    "from_python": Part(gpu_models.from_python, 40),
    "training": Part(gpu_models.training, 60),
    "backward": Part(gpu_kernels.backward, 40),
    "compiled_decoding": Part(gpu_models.compiled_decoding, 150),
    "compiled": Part(gpu_kernels.compiled, 90),
    "serving": Part(gpu_serving.serving, 480),
}


class Results:
    """What was found, in a file that is whole at any time.

    Args:
        path: a JSON file, written after each figure; a plot goes beside it. `None`: nothing is written.
        dry: whether it is a dry run.
    """

    def __init__(self, path: Path | None, dry: bool) -> None:
        self.path = path
        self.started = time.perf_counter()
        self.versions = versions(dry)
        self.rows: list[Row] = []
        if path is not None and path.exists():
            numbered = (path.with_suffix(f".{number}.json") for number in itertools.count(1))
            path.rename(next(earlier for earlier in numbered if not earlier.exists()))

    @property
    def ceilings(self) -> dict[str, float]:
        """Bandwidth and rate, if they were measured."""
        return next((row for row in self.rows if row["what"] == "ceilings" and "bytes_per_second" in row), {})

    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self.started

    def add(self, row: Row) -> None:
        """Prints a figure and writes all of them."""
        self.rows.append(row)
        text = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items() if k != "what")
        print(f"{row['what']:24} {text}", file=sys.stderr, flush=True)
        if self.path is not None:
            beside = self.path.with_suffix(".part")
            beside.write_text(self.json() + "\n")
            beside.replace(self.path)

    def json(self) -> str:
        """All that was found so far."""
        return json.dumps(self.versions | {"seconds": self.seconds(), "rows": self.rows}, indent=1)


class Worker:
    """A process that has imported everything, waits, and then runs a part.

    Args:
        name: the part's.
        command: what to start.
    """

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)

    def rows(self, given: dict[str, Any], seconds: float) -> Iterator[Row]:
        """Its figures as they come, and a row that says so if it did not end well.

        Args:
            given: what it waits for.
            seconds: after which it is ended.
        """
        late = threading.Event()

        def end() -> None:
            late.set()
            self.stop()

        timer = threading.Timer(seconds, end)
        timer.start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps(given) + "\n")
                self.process.stdin.close()
            for line in self.process.stdout:
                if line.endswith("\n"):  # else it was ended within
                    yield json.loads(line)
            code = self.process.wait()
        finally:
            timer.cancel()
            self.stop()
        if late.is_set() or code:
            how = f"ended after {seconds:.0f} seconds" if late.is_set() else f"exit code {code}"
            yield {"what": self.name, "failed": how}

    def stop(self) -> None:
        """Ends the process and those it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def work(name: str, released: Path | None) -> None:
    """Runs a part when the standard input says so, and writes its figures to the standard output."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no figure
    given = json.loads(sys.stdin.readline() or "null")
    if given is None:  # the run is over
        return

    def add(row: Row) -> None:
        print(json.dumps(row), file=out)

    bench = Bench(False, add, given["seconds"], given["ceilings"], released)
    try:
        PARTS[name].run(bench)
    except Exception as error:
        add({"what": name, "failed": f"{type(error).__name__}: {error}"[:500]})
        raise


def run(results: Results, names: list[str], minutes: float, released: Path | None) -> None:
    """Runs the parts one after another; while one runs, the next one imports."""

    def start(name: str | None) -> Worker | None:
        options = [] if released is None else ["--released", str(released)]
        return None if name is None else Worker(name, [sys.executable, __file__, "--part", name, *options])

    coming = start(names[0])
    for name, next_name in itertools.zip_longest(names, names[1:]):
        worker, coming = coming, start(next_name)
        assert worker is not None
        left = 60 * minutes - results.seconds()
        if left <= 0:
            worker.stop()
            results.add({"what": name, "left_out": "the time was over"})
            continue
        seconds = min(left, PARTS[name].seconds)
        for row in worker.rows({"seconds": seconds, "ceilings": results.ceilings}, seconds + GRACE):
            results.add(row)


def plot(rows: list[Row], path: Path) -> None:
    """The share of its floor that each kernel reaches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def name(row: Row) -> str:
        sizes = "".join(f", {k} {row[k]}" for k in ("N", "H", "B", "K", "D", "S", "masked") if k in row)
        return row["what"].removesuffix(", compiled") + sizes

    chosen = [row for row in rows if "of_floor" in row]
    names = [name(row) for row in chosen]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(names) + 1))
    axes.barh(names, [100 * row["of_floor"] for row in chosen], label="fused")
    others = {"eager": [(name(row), row["floor"] / row["eager_seconds"]) for row in chosen if "eager_seconds" in row]}
    compiled = [row for row in rows if row["what"].endswith(", compiled") and "seconds" in row]
    others["compiled"] = [(name(row), row["floor"] / row["seconds"]) for row in compiled if name(row) in names]
    for (label, found), mark in zip(others.items(), ("|", "x"), strict=True):
        if found:
            axes.plot([100 * x for _, x in found], [x for x, _ in found], mark, color="black", label=label)
    axes.set(xlabel="per cent of the floor's speed", xlim=(0, 105))
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to see that everything runs")
    parser.add_argument("--released", type=Path, help="folder of the released modeling code, to time it too")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS), help="parts to run")
    parser.add_argument("--minutes", type=float, default=8, help="after which no further figure is begun")
    parser.add_argument("--output", type=Path, help="JSON file for the results; a plot goes beside it")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        work(args.part, args.released)
        return
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("gpu_check needs a CUDA or ROCm device, and torch sees none; --dry-run needs none.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # and with it the process of the part that runs
    results = Results(args.output, args.dry_run)
    names = [name for name in PARTS if name in {*args.only, "ceilings"}]
    if args.dry_run:
        ceilings: dict[str, float] = {}
        for name in names:
            PARTS[name].run(Bench(True, results.add, ceilings=ceilings, released=args.released))
    else:
        run(results, names, args.minutes, args.released)
    if args.output is None:
        print(results.json())
    else:
        plot(results.rows, args.output.with_suffix(".png"))
    failed = [row["what"] for row in results.rows if "failed" in row]
    wrong = [row["what"] for row in results.rows if row.get("ok") is False]
    if failed or (wrong and not args.dry_run):
        sys.exit(f"Failed: {', '.join(failed) or 'none'}; above twice torch's own error: {', '.join(wrong) or 'none'}.")


if __name__ == "__main__":
    main()
