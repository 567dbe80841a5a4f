"""What the benchmarks' clocks, peaks and intervals measure."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from scipy.stats import ttest_1samp
from scripts import load_script

ROOT = Path(__file__).parents[2]

machine, law = map(load_script, ("machine", "law"))


@pytest.mark.parametrize(("device", "waits"), [("cpu", False), ("cuda", True), ("cuda:1", True)])
def test_a_step_ends_when_its_device_has_done_it(monkeypatch, device, waits):
    """That device, which need not be the current one."""
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", events.append)
    assert machine.seconds(lambda: events.append("step"), device) > 0
    assert events == ([device, "step", device] if waits else ["step"])


def test_a_peak_is_that_of_the_device(monkeypatch):
    cost = load_script("cost")
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: asked.append(device) or 7)
    assert cost.peak(lambda: None, "cuda:1") == 7
    assert asked == ["cuda:1"] * 2
    assert cost.peak(lambda: None, "cpu") is None


def test_the_overheads_peak_is_that_of_the_device(monkeypatch):
    overhead = [load_script(name) for name in ("released", "overhead")][1]
    monkeypatch.setattr(overhead, "build", lambda *args, **changed: None)
    monkeypatch.setattr(overhead, "train", lambda *args: lambda: None)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {"cuda:1": 7}.get)
    args = types.SimpleNamespace(shapes=["small"], batch_size=1, released=None, device="cuda:1")
    assert overhead.peak_bytes("plain", 1, 4, args) == 7


RELEASED = """
import time
from scipy.optimize import minimize

calls = []

def parametric_fit(N, P, loss):
    calls.append(N)
    for start in (1.0, 2.0, 3.0):
        minimize(lambda x: (x**2).sum(), start)
    time.sleep(0.3 if len(calls) == 1 else 0)
    print(f"best_func = {len(calls)}.5")
"""


def test_the_released_search_runs_as_often_as_ours(tmp_path):
    """Its fastest run counts, and the starts are those of one."""
    (tmp_path / "parametric_fit.py").write_text(RELEASED)
    found = law.released(tmp_path / "parametric_fit.py", sys.executable, 2)
    assert found.keys() == {"stack", "pile"}
    for figures in found.values():
        assert (figures["huber"], figures["starts"]) == (2.5, 3)
        assert 0 < figures["seconds"] < 0.3


def test_an_interval_over_documents_is_students():
    pytest.importorskip("onnxruntime")
    values = [0.1, 0.2, 0.4, 0.3]
    low, high = ttest_1samp(values, 0.0).confidence_interval()
    assert load_script("onnx_losses").interval(values) == f"+0.2500 ({low:+.4f}, {high:+.4f})"


def test_what_the_page_says_of_onnx_runtimes_speed():
    found = json.loads((ROOT / "benchmarks" / "results" / "onnx_runtime.json").read_text(encoding="utf-8"))
    by_torch = {dtype: [] for dtype in ("float32", "int8", "int4")}
    by_streams = {1: [], 2: [], 4: []}
    plain = found["rows"][0]["tokens_per_second"]
    for row in found["rows"]:
        rates = row["tokens_per_second"]
        for dtype, ratios in by_torch.items():
            ratios.append(rates[f"onnx {dtype}"] / rates["torch float32"])
            by_streams[row["num_streams"]].append(plain[f"onnx {dtype}"] / rates[f"onnx {dtype}"])
    text = " ".join((ROOT / "docs" / "edge.md").read_text(encoding="utf-8").split())
    assert f"In float32, ONNX Runtime is {span(by_torch['float32'])} times as fast as `generate` in PyTorch" in text
    assert f"; in int4 {span(by_torch['int4'])} times." in text
    assert f"two streams take {span(by_streams[2])} times as long as the plain model" in text
    assert f"and four {span(by_streams[4])} times." in text


def span(ratios):
    return f"{min(ratios):.1f} to {max(ratios):.1f}"
