"""The figures on the pages are those in the files that the benchmarks wrote."""

import importlib
import json
import re
import runpy
import sys
from itertools import pairwise, product
from math import log

import pytest
from figures_on_file import RESULTS, ROOT, on_file, page, with_interval


@pytest.fixture
def printed(monkeypatch, capsys):
    """What a program in `benchmarks/` prints."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def table(printed):
    """What a program in `benchmarks/` prints with `--table`."""
    return lambda script, *arguments: printed(script, "--table", *arguments)


def test_of_the_quickstart(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    tables = importlib.import_module("quickstart").tables
    report, text = on_file("quickstart.json"), (RESULTS / "quickstart.md").read_text(encoding="utf-8")
    assert tables(report) == text
    held = {(entry["arm"], entry["baseline"]) for entry in report["comparisons"]}
    assert {("frozen", "alone"), ("frozen", "prefix"), ("streams-and-backbone", "alone")} <= held
    for entry in report["comparisons"]:
        if entry["baseline"] == "untouched" or entry["arm"] in ("frozen", "streams-and-backbone"):
            assert with_interval(entry) in text
    for figures in report["models"].values():
        assert all(f"{loss:.4f}" in text for places in figures["loss"].values() for loss in places.values())
    assert '--8<-- "benchmarks/results/quickstart.md"' in page("results/quickstart.md")


def test_of_recycling():
    runs, text = on_file("recycle.json")["runs"], page("results/recycling.md")
    assert [run["num_streams"] for run in runs] == [1, 2, 4, 8, 4]
    for run in runs:
        shown = ["against untouched"] + ["against backbone alone"] * (run["kind"] == "streams and backbone")
        for baseline in shown:
            assert all(with_interval(found) in text for found in run[baseline].values())


def test_of_the_starts(table):
    table, text = table("inits.py"), page("results/starts.md")
    rows = re.findall(r'^\| (?:Qwen2|GPT-NeoX), `"\w+"`.*$', text, flags=re.MULTILINE)
    assert len(rows) == 10
    for row in rows:
        before, _, code, within, prose, _ = [cell.strip() for cell in row.split("|")][2:-1]
        assert re.search(
            rf"^\| .* {re.escape(before)} .* {re.escape(code)} .* {re.escape(within)} \| {re.escape(prose)} ",
            table,
            flags=re.MULTILINE,
        ), row
    assert "end-of-text token: held-out code -0.0189, prose -0.0032, held-out code, from within +0.0089" in table
    assert "-0.0189 on code, and +0.0089" in text.replace("\n", " ")


def test_of_the_transforms(table):
    assert table("transforms.py").strip() in page("results/transforms.md")


def test_of_training_by_trl(table):
    assert table("chat_training.py", RESULTS / "chat_training.json").strip() in page("training.md")


def test_of_serving(table):
    assert table("serving.py", RESULTS / "serving.json").strip() in page("results/serving.md")


def test_of_the_overhead(table):
    assert table("overhead.py", RESULTS / "overhead.json").strip() in page("results/overhead.md")


def timed(rows, *, model="parscale"):
    """Rows of times with streams."""
    return [
        row for row in rows if row["model"] == model and row["P"] > 1 and row["what"] in ("prefill", "decode", "train")
    ]


def over_floor(rows):
    return [row["ratio"] / row["floor"] for row in rows]


@pytest.mark.parametrize(
    ("name", "what", "models", "target"),
    [
        ("prefill", "prefill", ["parscale"], 1.03),
        ("decoded token, own keys", "decode", ["parscale"], 1.06),
        ("decoded token, shared keys", "decode", ["shared"], 1.06),
        ("training step", "train", ["parscale"], 1.05),
        ("memory in training", "train memory", ["parscale", "shared"], 1.03),
    ],
)
def test_of_the_overheads_targets(name, what, models, target):
    rows = [row for row in on_file("overhead.json")["rows"] if row["what"] == what and row["P"] > 1]
    found = over_floor(row for row in rows if row["model"] in models)
    missed = sum(ratio > target for ratio in found)
    assert f"| {name} | {target} | {len(found)} | {missed} |" in page("results/overhead.md")


def test_of_the_overhead_that_was_not_run():
    rows = on_file("overhead.json")["rows"]
    found = {(row["model"], row["what"], row["shape"], row["S"], row["P"]) for row in rows}
    own = product(["parscale"], ("prefill", "decode", "train", "train memory"))
    shared = product(["shared"], ("decode", "train memory"))  # what is another computation than with own keys
    shapes, sizes = ("small", "narrow", "heads", "llama", "qwen"), [*product((64, 256, 1024), (1, 2, 4, 8))]
    wanted = {(*kind, shape, *size) for kind, shape, size in product((*own, *shared), shapes, sizes)}
    missing = {("train memory", shape, 1024) for shape in shapes if shape != "narrow"}
    assert {(what, shape, S) for _, what, shape, S, _ in wanted - found} == missing
    said = "Not run is the memory in training at 1,024 tokens of small, heads, llama and qwen."
    assert said in page("results/overhead.md")


def test_of_the_overhead_in_short():
    rows = on_file("overhead.json")["rows"]
    own, shared = timed(rows), timed(rows, model="shared")
    qwen, others = ([row for row in own if (row["shape"] == "qwen") is wanted] for wanted in (True, False))
    most = [f"{max(over_floor(part)) - 1:.0%}".replace("%", " %") for part in (qwen, others, shared)]
    least, highest = (f"{100 * (of(row['floor'] for row in own) - 1):.0f}" for of in (min, max))
    text = page("results/index.md")
    assert f"up to {most[0]} at the shape of Qwen2.5-0.5B and up to {most[1]} at the others, over the floor" in text
    assert f"itself {least} to {highest} %; with shared keys a decoded token is up to {most[2]} over its floor" in text
    assert {row["what"] for row in shared} == {"decode"}


def test_of_the_versions():
    found = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}
    serving = found.pop("serving.json")
    said = "torch 2.13, transformers {}; serving with vLLM {} and transformers {}"
    texts = [json.dumps(results) for results in found.values()]
    versions = {version for text in texts for version in re.findall(r'"transformers": "(\d+\.\d+)\.', text)}
    assert len(versions) == 1
    shown = [version.rpartition(".")[0] for version in (serving["vllm"], serving["transformers"])]
    assert said.format(*versions, *shown) in page("results/index.md").replace("\n", " ")


def test_of_shared_keys(table, printed):
    assert table("shared.py", RESULTS / "shared.json").strip() in page("shared.md")
    assert table("adaptive.py", RESULTS / "adaptive.json").strip() in page("shared.md")
    for part in printed("shared.py", "--counted").strip().split("\n\n"):
        assert part in page("shared.md")


def test_of_onnx(table):
    pytest.importorskip("onnxruntime")
    assert table("onnx_runtime.py", RESULTS / "onnx_runtime.json").strip() in page("edge.md")
    assert table("onnx_losses.py", RESULTS / "onnx_losses.json").strip() in page("edge.md")


def test_of_the_mixins(monkeypatch, tmp_path):
    written = tmp_path / "mixins.md"
    monkeypatch.setattr(sys, "argv", ["mixins_page.py", "--output", str(written)])
    runpy.run_path(str(ROOT / "benchmarks" / "mixins_page.py"), run_name="__main__")
    assert written.read_text(encoding="utf-8") == page("results/mixins.md")


def test_of_the_cost():
    text, rows = page("results/cost.md"), on_file("cost.json")["rows"]
    ratios = [row["streams_to_dense"] for row in rows]
    assert f"{min(ratios):.2f} to {max(ratios):.2f} times as long" in " ".join(page("limits.md").split())
    for row in rows:
        ratios = [row[key] for key in ("streams_to_dense", "counted_streams_to_dense", "streams_to_plain")]
        cells = (row["streams"], row["batch_size"], *(f"{ratio:.2f}" for ratio in ratios))
        assert f"| {' | '.join(map(str, cells))} |" in text


def test_of_the_law():
    report, text = on_file("law.json"), page("results/law.md")
    stack, pile = report["fits"]["stack"], report["fits"]["pile"]
    for name, fit in (("Stack-V2-Python", stack), ("Pile", pile)):
        scale = f"{fit['A']:.3e}".replace("e+0", "e")
        assert f"| {name} | {fit['E']:.4f} | {scale} | {fit['alpha']:.4f} | {fit['r2']:.4f} |" in text
    intervals = ["{:.3f} ({:.3f}, {:.3f})".format(fit["k"], *fit["intervals"]["k"]) for fit in (stack, pile)]
    assert f"| {' | '.join(intervals)} |" in text


def test_of_what_a_doubling_lowers():
    """By the published law's formula, with the fit on file."""
    fit = on_file("law.json")["fits"]["stack"]
    losses = [fit["E"] + (fit["A"] / (1.6e9 * (1 + fit["k"] * log(P)))) ** fit["alpha"] for P in (1, 2, 4, 8)]
    first, second, third = (f"{more - less:.4f}" for more, less in pairwise(losses))
    said = f"at 1.6 billion parameters by {first}, {second} and {third} nats per token"
    assert said in " ".join(page("tutorials/choose.md").split())


def test_of_k_not_told_apart_from_zero():
    low, high = on_file("evidence.json")["law"]["N"]["all parameters"]["k_interval"]
    assert low < 0 < high
    for name in ("tutorials/choose.md", "how/law.md", "worth.md"):
        assert "k is not told apart from zero" in " ".join(page(name).split())


def test_of_memory_and_kernels_are_taken_from_the_files():
    assert '--8<-- "benchmarks/results/training_memory.md:3"' in page("results/memory.md")
    assert (RESULTS / "training_memory.md").read_text().splitlines()[2].startswith("| backbone | P |")
    assert '--8<-- "benchmarks/results/kernels.md"' in page("results/kernels.md")
