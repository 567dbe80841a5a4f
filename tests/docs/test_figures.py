"""The figures on the pages are those in the files that the benchmarks wrote."""

import importlib
import json
import re
import runpy
import sys
from itertools import pairwise, product
from math import log
from pathlib import Path
from statistics import fmean

import pytest
from scipy.stats import ttest_rel

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SEEDS = {2: "two seeds", 3: "three seeds"}


def page(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def on_file(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def with_interval(entry):
    return f"{entry['difference']:+.4f} ({entry['low']:+.4f}, {entry['high']:+.4f})"


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


def test_of_low_rank_differences():
    text = " ".join(page("results/controls.md").split())
    dense, twin = (
        compared(arm="P = 4, lora=4", baseline=name, size="0.1M", where="middle") for name in ("dense", "twin, lora=4")
    )
    said = (
        f"are {with_interval(dense)} from the dense model and {with_interval(twin)} from a dense twin of their own size"
    )
    assert f"{said} over {SEEDS[dense['seeds']]}: not told apart from either." in text
    assert dense["seeds"] == twin["seeds"]
    assert all(entry["low"] < 0 < entry["high"] for entry in (dense, twin))


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


@pytest.mark.parametrize("name", ["results/controls.md", "results/law.md"])
def test_of_our_own_law(name):
    law = on_file("evidence.json")["law"]
    found = law["N"]["all parameters"]
    text = " ".join(page(name).split())
    assert "k = {:.2f} ({:.2f}, {:.2f})".format(found["k"], *found["k_interval"]) in text
    assert re.search(rf"\b{law['models']} models", text)
    assert f"{law['k_without']['0.1M']:.2f}" in text


def test_of_the_law_without_one_size():
    smallest, *others = on_file("evidence.json")["law"]["k_without"].values()
    said = f"the first k is {smallest:.2f}, without those of any other size {min(others):.2f} to {max(others):.2f}."
    assert said in " ".join(page("results/controls.md").split())


def compared(**wanted):
    """The one comparison of the study that these fields tell."""
    (entry,) = (e for e in on_file("evidence.json")["comparisons"] if wanted.items() <= e.items())
    return entry


def test_of_the_larger_models():
    """Two and four streams against the dense model and one prefix, how alike two are, and what they lose alone."""
    text = " ".join(page("results/controls.md").split())
    for baseline, where in product(("dense", "long prefix", "prefix", "prefix, T = 16"), ("middle", "beginning")):
        entry = compared(arm="P = 2", baseline=baseline, size="0.7M", where=where)
        assert entry["seeds"] == 3
        ahead = (baseline, where) == ("dense", "middle")
        assert (entry["high"] < 0) == ahead
        assert ahead or entry["low"] < 0
        assert with_interval(entry) in text or (baseline.startswith("prefix") and where == "beginning")
    pairs = (
        ("P = 4", "long prefix", 1),
        ("P = 2", "twin", 3),
        ("P = 2", "average of 2", 3),
        ("average of 2", "dense", 3),
    )
    for arm, baseline, seeds in pairs:
        entry = compared(arm=arm, baseline=baseline, size="0.7M", where="middle")
        assert entry["seeds"] == seeds
        assert with_interval(entry) in text
    (fresh,) = (
        entry
        for entry in on_file("evidence.json")["confirmation"]
        if (entry["size"], entry["baseline"], entry["where"]) == ("0.7M", "dense", "middle")
    )
    assert fresh["low"] < 0 < fresh["high"]
    assert f"Over those two alone the lead is not told apart from zero, {with_interval(fresh)}" in text
    four, two = (compared(arm=arm, baseline="dense", size="0.2M", where="middle") for arm in ("P = 4", "P = 2"))
    said = "four streams are {:+.4f} from the dense model in the middle and two {:+.4f}."
    assert said.format(four["difference"], two["difference"]) in text
    mixing = {entry["size"]: entry for entry in on_file("evidence.json")["mixing"] if entry["arm"] == "P = 2"}
    (apart,) = (e for e in on_file("evidence.json")["mixing"] if (e["arm"], e["size"]) == ("average of 2", "0.7M"))
    assert f"trained apart correlate by {min(apart['correlations']):.2f}" in text
    smallest, largest = (mixing[size]["correlations"] for size in ("0.1M", "0.7M"))
    alike = f"{min(largest):.2f} to {max(largest):.2f} (at 0.1 million by {min(smallest):.2f} to {max(smallest):.2f})"
    assert f"their token losses correlate by {alike}" in text
    best, worst, weights = (mixing["0.7M"][name] for name in ("best_alone", "worst_alone", "largest_weights"))
    assert f"One alone loses {min(best):.2f} to {max(best):.2f} nats per byte" in text
    assert f"the other {min(worst):.2f} to {max(worst):.2f}" in text
    assert f"the larger weight of the two is {min(weights):.2f} to {max(weights):.2f}" in text
    between = [mixing[size]["correlations"][0] for size in ("0.2M", "0.4M")]
    assert "Two correlate by {:.2f}, at 0.4 million by {:.2f}.".format(*between) in text


def test_of_four_streams_at_rates_of_their_own():
    text, size = " ".join(page("results/controls.md").split()), {"size": "0.4M", "where": "middle"}
    found = {
        baseline: compared(arm="P = 4", baseline=baseline, **size)
        for baseline in ("dense", "prefix", "long prefix", "twin")
    }
    assert {entry["seeds"] for entry in found.values()} == {5}
    begun, short = (
        compared(arm="P = 4", baseline=name, size="0.4M", where="beginning") for name in ("dense", "prefix")
    )
    said = f"four streams are {with_interval(found['dense'])} from the dense model in the middle and"
    assert f"{said} {with_interval(begun)} at beginnings. **They are {with_interval(found['prefix'])} from" in text
    longer, twin = with_interval(found["long prefix"]), with_interval(found["twin"])
    assert f"{longer} from one of 4 T, and {twin} from a dense model of as many parameters." in text
    assert all(entry["low"] < 0 < entry["high"] for entry in (*found.values(), begun))
    assert short["high"] < 0
    assert f"At beginnings they are ahead of one prefix, {with_interval(short)}, and not told apart" in text
    (fresh,) = (
        entry
        for entry in on_file("evidence.json")["confirmation"]
        if (entry["arm"], entry["size"], entry["baseline"], entry["where"]) == ("P = 4", "0.4M", "dense", "middle")
    )
    assert (fresh["seeds"], fresh["low"] < 0 < fresh["high"]) == (4, True)
    assert f"nor over the four seeds after the one that chose the rates, {with_interval(fresh)} from the dense" in text

    def loss(name, on="test"):
        row = json.loads((ROOT / f"benchmarks/results/evidence/scratch/{name}.json").read_text())
        return fmean(row[on]["middle"])

    def tuned(arm, rate):
        return f"{loss(f'{arm}-t8-n9700000-r{rate}-s0', on='tuning'):.3f}"

    rates = ("0.004", "0.008", "0.016", "0.032")
    four, dense = ([tuned(f"streams-h80-l6-p{P}", rate) for rate in rates[:tried]] for P, tried in ((4, 4), (1, 3)))
    assert "four streams lose {}, {}, {} and {}; at the first three, the dense model loses".format(*four) in text
    assert "the dense model loses {}, {} and {}.".format(*dense) in text
    prefix = [tuned("prefix-h80-l6-p1", rate) for rate in rates[1:3]]
    assert "one of T tokens loses {} at the rate and {} at twice that".format(*prefix) in text

    def at_both(arm):
        return [loss(f"{arm}-n25000000-r{rate}-s0", on="tuning") for rate in rates[1:3]]

    arms = ("streams-h128-l6-p4-t8", "streams-h128-l6-p1-t8", "prefix-h128-l6-p1-t8", "prefix-h128-l6-p1-t32")
    pairs = [at_both(arm) for arm in arms]
    assert all(at_the_rate < twice for at_the_rate, twice in pairs)
    four, dense, short, long = (f"{at_the_rate:.3f} and {twice:.3f}" for at_the_rate, twice in pairs)
    said = (
        f"{four} with four streams, {dense} without, {short} with one prefix of T and {long} with one of 4 T: twice is"
    )
    assert f"{said} too much for all." in text

    arms = ("streams-h80-l6-p1-t8-{}-r0.008", "twin-h80-l6-p4-t8-{}-r0.008", "streams-h80-l6-p4-t8-{}-r0.016")
    arms += ("prefix-h80-l6-p1-t8-{}-r0.016", "prefix-h80-l6-p1-t32-{}-r0.016")
    by_seed = [[loss(f"{arm.format('n9700000')}-s{seed}") for seed in range(5)] for arm in arms]
    spreads = [max(found) - min(found) for found in by_seed]
    assert f"seeds of one arm differ by {min(spreads):.2f} to {max(spreads):.2f}." in text
    apart = max(abs(four - prefix) for four, prefix in zip(by_seed[2], by_seed[3], strict=True))
    assert f"Seed by seed, four streams and one prefix of T tokens differ by {apart:.2f} at most." in text
    (mixed,) = (e for e in on_file("evidence.json")["mixing"] if (e["arm"], e["size"]) == ("P = 4", "0.4M"))
    assert f"each seed one stream has a mean weight of {min(mixed['largest_weights']):.2f} or more" in text
    more = mixed["best_less_mixed"]
    assert f"alone it loses {min(more):.4f} to {max(more):.4f} more than all four together." in text


def test_of_four_streams_at_the_largest_size():
    text = " ".join(page("results/controls.md").split())

    def against(baseline, where="middle", arm="P = 4"):
        return compared(arm=arm, baseline=baseline, size="1.0M", where=where)

    dense, short, long, begun = (
        against("dense"),
        against("prefix"),
        against("long prefix"),
        against("dense", "beginning"),
    )
    assert dense["seeds"] == short["seeds"] == 3
    assert dense["high"] < 0
    assert all(entry["low"] < 0 < entry["high"] for entry in (short, long, begun))
    assert f"four streams are ahead of the dense model in the middle, {with_interval(dense)}" in text
    said = f"is not told apart from them**, {with_interval(short)}, nor one of 4 T over {SEEDS[long['seeds']]}"
    assert f"{said}, {with_interval(long)}" in text
    assert f"At beginnings they are not told apart from the dense model, {with_interval(begun)}" in text
    twin = against("twin")
    assert twin["seeds"] == 3
    assert f"They are {with_interval(twin)} from a dense model of as many parameters" in text
    (fresh,) = (
        entry
        for entry in on_file("evidence.json")["confirmation"]
        if (entry["size"], entry["baseline"], entry["where"]) == ("1.0M", "dense", "middle")
    )
    assert fresh["seeds"] == 2
    assert fresh["high"] < 0
    assert f"over those two alone the lead over the dense model is {with_interval(fresh)}, which excludes zero" in text
    mixing = {e["arm"]: e for e in on_file("evidence.json")["mixing"] if e["size"] == "1.0M"}
    four, two = mixing["P = 4"], mixing["P = 2"]
    said = "a largest mean weight of {:.3f}; with the others one stream has {:.3f} and {:.3f}, and **that one is the"
    assert said.format(*four["largest_weights"]) in text
    mixture, *settled = four["best_less_mixed"]
    assert "alone it loses {:.4f} and {:.4f} nats per byte more than all four together".format(*settled) in text
    assert f"with the first seed the best loses {mixture:.4f} more" in text
    assert "Their token losses correlate by {:.2f}, {:.2f} and {:.2f}".format(*four["correlations"]) in text
    said = "have settled on one ({:.2f} of the weight; alone it loses {:.4f} more) and are {:+.4f} from the dense model"
    behind = against("dense", arm="P = 2")["difference"]
    assert said.format(two["largest_weights"][0], two["best_less_mixed"][0], behind) in text


def test_of_what_the_aggregator_settled_on():
    mixing = on_file("evidence.json")["mixing"]
    weights = [weight for entry in mixing if entry["arm"] == "P = 4" for weight in entry["largest_weights"]]
    assert (sum(weight >= 0.91 for weight in weights), len(weights)) == (9, 13)
    assert "In nine of thirteen runs of P = 4 as published, at 0.1 to 1.0 million, one stream ends with" in " ".join(
        page("results/controls.md").split()
    )


def test_of_recycled_tokens():
    (found,) = re.findall(r"\| everything trained \|.*\n\|---.*\n((?:\|.*\n)+)", page("results/controls.md"))
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in found.splitlines()]
    arms = {"the backbone trained alone": "alone", "one prefix of T tokens": "prefix-and-backbone"}
    arms["one prefix of 4 T tokens"] = "long-prefix-and-backbone"
    assert len(rows) == 5
    for size, against, *cells in rows:
        for tokens, cell in zip((250_000, 1_000_000, 4_000_000), cells, strict=True):
            about = {"arm": "streams-and-backbone", "where": "middle", "tokens": tokens, "size": size}
            entry = compared(baseline=arms[against], **about)
            assert with_interval(entry) == cell.removesuffix(", one seed")
            assert (entry["seeds"] == 3) is (tokens != 1_000_000 and not cell.endswith(", one seed"))
    text = " ".join(page("results/controls.md").split())
    for against in ("the backbone trained alone", "one prefix of T tokens"):
        by_seed = [recycled("streams-and-backbone-p4", seed) - recycled(arms[against], seed) for seed in range(3)]
        assert "{:+.4f}, {:+.4f} and {:+.4f} from ".format(*by_seed) + against in text


def recycled(arm, seed):
    """The loss in the middle of test documents after four million recycled tokens."""
    (path,) = (RESULTS / "evidence" / "recycling").glob(f"recycle-{arm}-*n4000000-b0.0004-*s{seed}.json")
    return fmean(json.loads(path.read_text())["test"]["middle"])


def test_of_the_recycled_variants_of_one_cache():
    text, of_shared = (" ".join(page(name).split()) for name in ("results/controls.md", "shared.md"))
    about = {"study": "recycling", "size": "P = 4", "where": "middle", "tokens": 250_000}
    for variant, seeds, baselines in (
        ("shared-prefix", 3, ("frozen, shared", "frozen", "prefix")),
        ("shared-window=8", 1, ("frozen, shared",)),
        ("shared-own", 1, ("frozen, shared",)),
    ):
        for baseline in baselines:
            entry = compared(arm=f"frozen, {variant}", baseline=baseline, **about)
            assert entry["seeds"] == seeds
            assert with_interval(entry) in text, (variant, baseline)
    brought = compared(arm="frozen, shared-prefix", baseline="frozen, shared", **about)["difference"]
    cost = compared(arm="frozen, shared", baseline="frozen", **about)["difference"]
    assert f"brings back {-brought:.4f} of the {cost:.4f} over three seeds" in of_shared


def test_of_tasks():
    """What the page says of P = 4 against each control, and how many seeds got to adding at all."""
    text = " ".join(page("results/controls.md").split())
    tasks = {(entry["task"], entry["arm"]): entry for entry in on_file("evidence.json")["tasks"]}
    signs = {"dense": False, "twin": False, "twice as wide": False, "prefix": True, "long prefix": True}
    more = {arm: tasks["sort", arm]["gain of P = 4"] for arm in signs}
    for arm, signed in signs.items():
        sign = "+" if signed else ""
        figures = f"{{difference:{sign}.3f}} ({{low:{sign}.3f}}, {{high:{sign}.3f}})".format(**more[arm])
        assert figures in text, arm
        assert more[arm]["seeds"] == 6
    learned = {arm: sum(share > 0.1 for share in tasks["add", arm]["exact"]) for arm in ("dense", "P = 2", "P = 4")}
    assert learned == {"dense": 3, "P = 2": 5, "P = 4": 5}
    assert all(min(tasks["add", arm]["exact"]) > 0.6 for arm in ("prefix", "long prefix"))
    behind = tasks["multiply", "dense"]["gain of P = 4"]
    figures = "{difference:.3f} ({low:.3f}, {high:.3f})".format(**behind)
    assert f"four streams are behind the dense model, {figures}" in text
    assert behind["high"] < 0
    assert "the dense model does with three seeds of six, streams with five" in text


@pytest.mark.parametrize("prefix_length", [8, 32])
def test_of_one_prefix_at_the_dense_models_rate(prefix_length):
    def right(arm, length):
        name = f"sort-10-{arm}-h32-l1-p1-t{length}-*-r0.008-s[0-5].json"
        paths = sorted((ROOT / "benchmarks" / "results" / "evidence" / "tasks").glob(name))
        assert len(paths) == 6
        return [json.loads(path.read_text())["test"]["exact"] for path in paths]

    interval = ttest_rel(right("prefix", prefix_length), right("streams", 8)).confidence_interval()
    assert interval.low < 0 < interval.high


def test_of_memory_and_kernels_are_taken_from_the_files():
    assert '--8<-- "benchmarks/results/training_memory.md:3"' in page("results/memory.md")
    assert (RESULTS / "training_memory.md").read_text().splitlines()[2].startswith("| backbone | P |")
    assert '--8<-- "benchmarks/results/kernels.md"' in page("results/kernels.md")
