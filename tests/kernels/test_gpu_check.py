"""The programs for a GPU, with tiny sizes and without one: they run through and write what they promise."""

import contextlib
import functools
import importlib
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu_check(monkeypatch):
    """The program, imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_check")


@pytest.mark.slow
def test_dry_run(programs, tmp_path):
    result = programs.run(BENCHMARKS / "gpu_check.py", "--dry-run", "--output", tmp_path / "gpu.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["device"] == "dry run"
    assert found["torch"] == torch.__version__
    rows = found["rows"]
    assert rows[0]["what"] == "ceilings"
    assert {"bytes_per_second", "operations_per_second", "shortest_seconds"} <= set(rows[0])
    assert rows[1]["what"] == "step"  # the most valuable first
    kinds = {row["what"] for row in rows}
    operations = {"aggregate", "aggregator", "decode attention", "prefill attention"}
    others = {"causal attention without prefix", "linear layer", "step from Python", "compiled step"}
    others |= {"token of generate", "training"}
    assert operations | {f"{name}, compiled" for name in operations} | others <= kinds
    assert {f"{name}, both ways" for name in ("aggregate", "aggregator", "prefill attention")} <= kinds
    steps = {(row["P"], row["attention"], row["kv"], row["length"]) for row in rows if row["what"] == "step"}
    ways = [(1, "sdpa", "own"), (1, "own_decode", "own")]
    ways += [(P, "sdpa", kv) for P in (2, 4, 8) for kv in ("own", "shared")]
    assert steps == {(*way, length) for way in ways for length in (8, 16, 24)}
    for row in rows:
        if row["what"] == "step" and row["P"] > 1:
            assert {"to_P1_by_sdpa", "to_P1_by_own_decode"} <= set(row)
    for what in ("compiled step", "token of generate", "step from Python"):
        assert [row["P"] for row in rows if row["what"] == what] == [1, 8]
    errors = [row for row in rows if row["what"].startswith("error ")]
    assert {row["dtype"] for row in errors} == {"bfloat16", "float16", "float32"}
    assert all(row["ok"] for row in errors)
    attention = {f"error decode attention{kind}" for kind in ("", ", masked", ", shared keys")}
    assert attention <= {row["what"] for row in errors}
    for row in errors:
        if "prefill" not in row["what"]:  # which is merged on a CPU too; of all others, the reference runs
            assert row["fused"] == row["torch"]
    assert not any({"failed", "left_out"} & set(row) for row in rows if row["what"] != "serving")
    assert (tmp_path / "gpu.png").stat().st_size > 0


def test_figures_are_written_as_they_come(gpu_check, tmp_path):
    """A run that is cut short leaves those that it has found, and the next run leaves that file alone."""
    path = tmp_path / "gpu.json"
    for run in range(3):
        results = gpu_check.Results(path, dry=True)
        for number in range(3):
            results.add({"what": "something", "run": run, "number": number})
            assert len(json.loads(path.read_text())["rows"]) == number + 1
    earlier = [json.loads((tmp_path / name).read_text())["rows"][0]["run"] for name in ("gpu.1.json", "gpu.2.json")]
    assert earlier == [0, 1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gpu.1.json", "gpu.2.json", "gpu.json"]


ROW = (
    'import json, sys; given = json.loads(sys.stdin.readline()); print(json.dumps({"what": "a"} | given), flush=True);'
)


@pytest.mark.parametrize(
    ("then", "seconds", "failed"),
    [
        ("", 20, None),
        ("sys.exit(3)", 20, "exit code 3"),
        ("import os; os.abort()", 20, "exit code -6"),  # as CUDA does after an illegal access
        ("import time; time.sleep(60)", 1, "ended after 1 seconds"),  # a kernel that hangs
        ('print("{", end="", flush=True); import time; time.sleep(60)', 1, "ended after 1 seconds"),
    ],
)
def test_a_part_that_fails_or_hangs_leaves_its_figures(gpu_check, then, seconds, failed):
    worker = gpu_check.Worker("part", [sys.executable, "-c", ROW + then])
    rows = list(worker.rows({"seconds": 5}, seconds))
    assert rows == [{"what": "a", "seconds": 5}, *([] if failed is None else [{"what": "part", "failed": failed}])]
    assert worker.process.poll() is not None


def test_parts_have_what_is_left_of_the_time(gpu_check, monkeypatch, tmp_path):
    """Each begins no figure after its limit or that of the run, and the last ones are left out by name."""
    given = []

    class Worker:
        def __init__(self, name, command):
            assert command[-1] == name
            self.name = name

        def rows(self, told, seconds):
            given.append((self.name, told["seconds"], seconds - told["seconds"], told["ceilings"]))
            now[0] += 100
            yield {"what": "ceilings", "bytes_per_second": 1.0} if self.name == "ceilings" else {"what": self.name}

        def stop(self):
            pass

    now = [0.0]
    monkeypatch.setattr(gpu_check, "Worker", Worker)
    monkeypatch.setattr(gpu_check.Results, "seconds", lambda self: now[0])
    results = gpu_check.Results(None, dry=True)
    names = ["ceilings", "decoding", "mixing", "training", "serving"]
    gpu_check.run(results, names, minutes=4, released=None)
    assert [(name, seconds) for name, seconds, _, _ in given] == [("ceilings", 30), ("decoding", 140), ("mixing", 40)]
    assert {grace for _, _, grace, _ in given} == {gpu_check.GRACE}
    assert [bool(ceilings) for *_, ceilings in given] == [False, True, True]
    assert [row["what"] for row in results.rows if "left_out" in row] == ["training", "serving"]


def test_a_figure_that_fails_does_not_take_the_next(gpu_check):
    rows = []
    bench = gpu_check.Bench(True, rows.append)
    bench.dry = False  # in a dry run an error is one

    def fail():
        raise ValueError("no room")

    bench.figure("first", fail, N=1)
    bench.figure("second", lambda: {"seconds": 2.0}, N=2)
    bench.ends = 0
    bench.figure("third", fail)
    assert rows == [
        {"what": "first", "N": 1, "failed": "ValueError: no room"},
        {"what": "second", "N": 2, "seconds": 2.0},
        {"what": "third", "left_out": "the time was over"},
    ]


def test_a_graph_keeps_what_it_reads(gpu_check, monkeypatch):
    """A replay reads the call's tensors by their addresses, which others would get once the call is gone."""
    replays = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: replays.append(1)))
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
    x = torch.zeros(3)
    replay, read = gpu_check.Bench(dry=False).graphed(functools.partial(x.add_, 1)), weakref.ref(x)
    del x
    replay()
    assert replays == [1]
    assert read() is not None
    assert read().tolist() == [4.0] * 3  # three runs to warm up, one to record


@pytest.mark.parametrize(
    ("part", "failing", "ratios"),
    [("training", "training", []), ("compiled_decoding", "compiled step", ["token of generate"] * 2)],
    ids=["training", "decoding"],
)
def test_no_figure_stands_in_for_a_baseline_that_failed(part, failing, ratios, gpu_check):
    """The first of its kind, of P = 1, fails; the next one is no ratio to itself."""
    rows, fails = [], iter([True])

    def figure(what, find, **sizes):
        with contextlib.suppress(MemoryError):
            rows.append({"what": what, **sizes, **find()})

    def seconds(call, repeats=30):
        if next(fails, False):
            raise MemoryError
        return 2.0

    bench = gpu_check.Bench(dry=True)
    bench.figure, bench.seconds = figure, seconds
    getattr(gpu_check.gpu_models, part)(bench)
    assert [row["P"] > 1 for row in rows if row["what"] == failing] == [True]
    assert [row["what"] for row in rows if "to_P1" in row] == ratios


@pytest.mark.slow
@pytest.mark.nightly
def test_tune_script_runs_dry(tmp_path):
    """What ships is tried first, then others, which are right too; the host functions choose as before afterwards."""
    pytest.importorskip("triton")
    options = ("--dry-run", "--only", "N=1", "--output", str(tmp_path / "tune.json"))
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, BENCHMARKS / "tune.py", *options]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads((tmp_path / "tune.json").read_text())
    assert {(row["by"], row["N"]) for row in found["products"]} == {
        (by, N) for by in ("cublas", "cudnn") for N in (20, 40)
    }
    assert all(row["error"] < 0.01 for row in found["products"])
    assert [subject["subject"] for subject in found["subjects"]] == ["aggregator, N=1", "aggregator's end, N=1"]
    for subject in found["subjects"]:
        rows = subject["rows"]
        assert rows[0]["config"]["num_warps"] in (4, 8)
        assert len(rows) == 3
        assert all(row["right"] for row in rows)
        assert len({json.dumps(row["config"]) for row in rows}) >= 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(programs, tmp_path):
    result = programs.run(BENCHMARKS / "gpu_check.py", "--output", tmp_path / "gpu.json", cwd=tmp_path)
    assert result.returncode == 1
    assert "needs a CUDA or ROCm device, and torch sees none; --dry-run needs none." in result.stderr
    assert not list(tmp_path.iterdir())
