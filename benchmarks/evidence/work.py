r"""Does what is missing of the study, one model after another; several workers may run, and be killed, at any time.

    export OMP_NUM_THREADS=1 MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184
    for worker in 1 2; do
        setsid nohup nice -n 5 .venv/bin/python -P benchmarks/evidence/work.py >> build/evidence/$worker.log 2>&1 &
    done

The last three keep freed memory for the next step, where glibc gives it back to the system each time; without them a
fifth of the time of two and four streams goes there.

Finished rows lie in `benchmarks/results/evidence/`, what is unfinished in `build/evidence/`.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import ensembles
import numpy as np
import recycling
import scratch
import synthetic
import torch
from arms import Run
from ensembles import EnsembleRun
from loop import claimed
from plan import AnyRun, gpu_plan, plan, read_rows
from synthetic import TaskRun

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "evidence")
    parser.add_argument("--gpu", action="store_true", help="the two studies at the size of one GPU")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "evidence")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    planned = gpu_plan if args.gpu else plan
    failed: set[str] = set()
    while missing := [run for rows in [read_rows(args.results)] for run in planned(rows) if run.name not in rows]:
        missing = [run for run in missing if run.name not in failed]
        if not missing:
            raise SystemExit(f"These runs failed, for the reasons above: {', '.join(sorted(failed))}.")
        for run in missing:
            with claimed(args.work / f"{run.name}.lock") as is_mine:
                if is_mine and run.name not in read_rows(args.results):
                    try:
                        print(time.strftime("%H:%M:%S"), run.name, do(run, args.work, args.results), flush=True)
                    except Exception:  # the next runs may do
                        traceback.print_exc()
                        failed.add(run.name)
                    break
        else:
            time.sleep(10)  # the others are at work on what is left


def do(run: AnyRun, work: Path, results: Path) -> str:
    """Trains and measures one model; what to print of it, which is its loss on what is for tuning."""
    if isinstance(run, Run):
        row = scratch.train(run, work, results / "scratch")
    elif isinstance(run, EnsembleRun):
        row = ensembles.train(run, work, results / "averages")
    elif isinstance(run, TaskRun):
        row = synthetic.train(run, work, results / "tasks")
    else:
        row = recycling.train(run, work, results / "recycling")
    return ", ".join(f"{what} {np.mean(found):.4f}" for what, found in row["tuning"].items())


if __name__ == "__main__":
    main()
