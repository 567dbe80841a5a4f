"""The figures on the page of the study are those in its files."""

import json
import re
from itertools import product
from statistics import fmean

import pytest
from figures_on_file import RESULTS, ROOT, on_file, page, with_interval
from scipy.stats import ttest_rel

SEEDS = {2: "two seeds", 3: "three seeds"}


def compared(**wanted):
    """The one comparison of the study that these fields tell."""
    (entry,) = (e for e in on_file("evidence.json")["comparisons"] if wanted.items() <= e.items())
    return entry


def test_of_streams_as_published():
    text = " ".join(page("results/controls.md").split())
    about = {"size": "0.1M", "where": "middle"}
    dense, wide, average = (
        compared(arm="P = 4", baseline=name, **about) for name in ("dense", "twice as wide", "average of 4")
    )
    assert f"four are {with_interval(dense)} from the dense model in the middle" in text
    assert f"A dense model of twice the width, at equal cost, is {wide['difference']:.2f} ahead of them." in text
    assert dense["low"] < 0 < dense["high"]
    assert min(wide["low"], average["low"]) > 0.03
    one_cache = compared(arm="P = 4, shared", baseline="P = 4", **about)
    assert f"ends at the loss of caches of their own, {with_interval(one_cache)}." in text
    assert one_cache["low"] < 0 < one_cache["high"]


def test_of_a_vector_for_each_stream():
    text = " ".join(page("results/controls.md").split())
    dense, one = (
        compared(arm="P = 2, embedding", baseline=name, size="0.1M", where="middle")
        for name in ("dense", "prefix, embedding")
    )
    assert f"Over eight seeds two streams with it are {with_interval(dense)} from the dense model" in text
    assert f"from one prefix with one vector, without streams**, {with_interval(one)}." in text
    assert dense["seeds"] == one["seeds"] == 8
    assert dense["high"] < 0
    assert one["low"] < 0 < one["high"]


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
    assert all(entry["low"] < 0 < entry["high"] for entry in (*found.values(), begun))
    assert short["high"] < 0
    (fresh,) = (
        entry
        for entry in on_file("evidence.json")["confirmation"]
        if (entry["arm"], entry["size"], entry["baseline"], entry["where"]) == ("P = 4", "0.4M", "dense", "middle")
    )
    assert (fresh["seeds"], fresh["low"] < 0 < fresh["high"]) == (4, True)
    assert f"four streams at 0.4 million are {with_interval(fresh)} from the dense model in the middle" in text

    def loss(name, on="test"):
        row = json.loads((ROOT / f"benchmarks/results/evidence/scratch/{name}.json").read_text())
        return fmean(row[on]["middle"])

    def tuned(arm, rate):
        return f"{loss(f'{arm}-t8-n9700000-r{rate}-s0', on='tuning'):.3f}"

    rates = ("0.004", "0.008", "0.016", "0.032")
    four, dense = ([tuned(f"streams-h80-l6-p{P}", rate) for rate in rates[:tried]] for P, tried in ((4, 4), (1, 3)))
    assert "| 0.4 million, four streams | {} | {} | {} | {} |".format(*four) in text
    assert "| 0.4 million, the dense model | {} | {} | {} | |".format(*dense) in text
    prefix = [tuned("prefix-h80-l6-p1", rate) for rate in rates[1:3]]
    assert "| 0.4 million, one prefix of T | | {} | {} | |".format(*prefix) in text

    def at_both(arm):
        return [loss(f"{arm}-n25000000-r{rate}-s0", on="tuning") for rate in rates[1:3]]

    arms = ("streams-h128-l6-p4-t8", "streams-h128-l6-p1-t8", "prefix-h128-l6-p1-t8", "prefix-h128-l6-p1-t32")
    pairs = [at_both(arm) for arm in arms]
    assert all(at_the_rate < twice for at_the_rate, twice in pairs)
    titles = ("four streams", "the dense model", "one prefix of T", "one prefix of 4 T")
    for title, (at_the_rate, twice) in zip(titles, pairs, strict=True):
        assert f"| 1.0 million, {title} | | {at_the_rate:.3f} | {twice:.3f} | |" in text
    assert "At 1.0 million twice is too much for all." in text

    arms = ("streams-h80-l6-p1-t8-{}-r0.008", "twin-h80-l6-p4-t8-{}-r0.008", "streams-h80-l6-p4-t8-{}-r0.016")
    arms += ("prefix-h80-l6-p1-t8-{}-r0.016", "prefix-h80-l6-p1-t32-{}-r0.016")
    by_seed = [[loss(f"{arm.format('n9700000')}-s{seed}") for seed in range(5)] for arm in arms]
    spreads = [max(found) - min(found) for found in by_seed]
    assert f"seeds of one arm differ by {min(spreads):.2f} to {max(spreads):.2f}." in text
    apart = max(abs(four - prefix) for four, prefix in zip(by_seed[2], by_seed[3], strict=True))
    assert f"Seed by seed, four streams and one prefix of T tokens differ by {apart:.2f} at most." in text
    (mixed,) = (e for e in on_file("evidence.json")["mixing"] if (e["arm"], e["size"]) == ("P = 4", "0.4M"))
    alike, more = mixed["correlations"], mixed["best_less_mixed"]
    cells = f"{min(alike):.2f} to {max(alike):.2f} | {min(mixed['largest_weights']):.2f} or more with each"
    assert f"| 0.4 million, P = 4, five seeds | {cells} | {min(more):.4f} to {max(more):.4f} |" in text


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
    twin = against("twin")
    assert twin["seeds"] == 3
    (fresh,) = (
        entry
        for entry in on_file("evidence.json")["confirmation"]
        if (entry["size"], entry["baseline"], entry["where"]) == ("1.0M", "dense", "middle")
    )
    assert fresh["seeds"] == 2
    assert fresh["high"] < 0
    assert f"and four at 1.0 million {with_interval(fresh)}." in text
    mixing = {e["arm"]: e for e in on_file("evidence.json")["mixing"] if e["size"] == "1.0M"}
    four, two = mixing["P = 4"], mixing["P = 2"]
    cells = [
        f"{{:.{digits}f}}, {{:.{digits}f}} and {{:.{digits}f}}".format(*four[key])
        for key, digits in (("correlations", 2), ("largest_weights", 3), ("best_less_mixed", 4))
    ]
    assert f"| 1.0 million, P = 4, three seeds | {' | '.join(cells)} |" in text
    row = "| 1.0 million, P = 2, one seed | {:.2f} | {:.2f} | {:.4f} |"
    assert row.format(*(two[key][0] for key in ("correlations", "largest_weights", "best_less_mixed"))) in text
    assert f"two streams are {against('dense', arm='P = 2')['difference']:+.4f} from the dense model." in text


@pytest.mark.parametrize(
    ("title", "baselines"),
    [
        ("the dense model", ("dense", "dense", "dense")),
        ("one prefix of T", ("prefix", "prefix", "prefix")),
        ("one prefix of P T", ("long prefix", "prefix, T = 16", "long prefix")),
        ("one prefix of 4 T", ("", "long prefix", "")),
        ("a dense model of as many parameters as P = 4", ("twin", "twin", "twin")),
        ("the average of two dense models", ("", "average of 2", "")),
    ],
)
def test_of_the_table_of_larger_models(title, baselines):
    sizes = (("P = 4", "0.4M", 5), ("P = 2", "0.7M", 3), ("P = 4", "1.0M", 3))
    cells = []
    for (arm, size, seeds), baseline in zip(sizes, baselines, strict=True):
        for where in ("beginning", "middle"):
            about = {"arm": arm, "baseline": baseline, "size": size, "where": where, "seeds": seeds}
            cells.append(with_interval(compared(**about)) if baseline else "")
    row = " ".join(f"| {' | '.join([title, *cells])} |".split())
    assert row in " ".join(page("results/controls.md").split())


def test_of_what_the_aggregator_settled_on():
    mixing = on_file("evidence.json")["mixing"]
    weights = [weight for entry in mixing if entry["arm"] == "P = 4" for weight in entry["largest_weights"]]
    assert (sum(weight >= 0.91 for weight in weights), len(weights)) == (9, 13)
    assert "In nine of thirteen runs of P = 4 as published, at 0.1 to 1.0 million, one stream ends with" in " ".join(
        page("results/controls.md").split()
    )


def test_of_recycled_tokens():
    text = page("results/controls.md")
    head, rows = re.search(r"\| everything trained \| against \|(.*)\|\n\|---.*\n((?:\|.*\n)+)", text).groups()
    budgets = [cell.strip().replace(" tokens", "").split(", ") for cell in head.split("|")]
    found = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]
    tokens = {"250 thousand": 250_000, "1 million": 1_000_000, "4 million": 4_000_000, "16 million": 16_000_000}
    arms = {"the backbone trained alone": "alone", "one prefix of T tokens": "prefix-and-backbone"}
    arms["one prefix of 4 T tokens"] = "long-prefix-and-backbone"
    assert len(found) == 5
    comparisons = on_file("evidence.json")["comparisons"]
    for size, against, *cells in found:
        about = {"arm": "streams-and-backbone", "where": "middle", "size": size, "baseline": arms[against]}
        for (amount, seeds), cell in zip(budgets, cells, strict=True):
            wanted = (about | {"tokens": tokens[amount]}).items()
            entries = [entry for entry in comparisons if wanted <= entry.items()]
            assert [with_interval(entry) for entry in entries] == [cell.removesuffix(", one seed")] * (cell != "")
            few = cell.endswith(", one seed") or seeds == "one seed"
            assert all(entry["seeds"] == (1 if few else 3) for entry in entries)


def test_of_recycled_tokens_by_seed():
    text = " ".join(page("results/controls.md").split())
    arms = {"the backbone trained alone": "alone", "one prefix of T tokens": "prefix-and-backbone"}
    for against, arm in arms.items():
        by_seed = [recycled("streams-and-backbone-p4", seed) - recycled(arm, seed) for seed in range(3)]
        assert "{:+.4f}, {:+.4f} and {:+.4f} from ".format(*by_seed) + against in text
    about = {"arm": "streams-and-backbone", "size": "P = 4", "tokens": 16_000_000, "baseline": "prefix-and-backbone"}
    begun = compared(**about, where="beginning")
    assert f"at beginnings too, there by {with_interval(begun)} of one prefix of T tokens." in text
    assert begun["high"] < 0


def test_of_recycled_streams_at_a_rate_of_the_aggregators_own():
    text = page("results/controls.md")
    (table,) = re.findall(r"\| P = 4 \| against \| beginning \| middle \|\n\|[-|]+\|\n((?:\|.*\n)+)", text)
    trained = {"everything trained": "streams-and-backbone", "backbone frozen": "frozen"}
    beside = {"everything trained": "-and-backbone", "backbone frozen": ""}
    behind, rows = set(), [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    for what, against, *cells in rows:
        arm = trained[what]
        baseline = {
            "the backbone trained alone": "alone",
            "a low-rank adapter of as many parameters": "lora",
            "one prefix of T tokens": f"prefix{beside[what]}",
            "one prefix of 4 T tokens": f"long-prefix{beside[what]}",
            "four streams at one rate": arm,
        }[against]
        about = {"arm": f"{arm}, aggregator's rate", "baseline": baseline, "size": "P = 4", "tokens": 250_000}
        for where, cell in zip(("beginning", "middle"), cells, strict=True):
            entry = compared(**about, where=where)
            assert cell == with_interval(entry)
            assert entry["seeds"] == 3
            if entry["high"] > 0:
                behind.add((what, baseline, where))
    said = " ".join(text.split())
    for against, baseline in (
        ("the backbone trained alone", "alone"),
        ("one prefix of T tokens", "prefix-and-backbone"),
    ):
        streams = [recycled("streams-and-backbone-p4", seed, "-a0.0005") for seed in range(2)]
        by_seed = [loss - recycled(baseline, seed) for seed, loss in enumerate(streams)]
        assert "{:+.4f} and {:+.4f} from ".format(*by_seed) + against in said
    name = "recycle-prefix-and-backbone-p1-n250000-b0.0004-r{}-s100.json"
    paths = [RESULTS / "evidence" / "recycling" / name.format(rate) for rate in (0.16, 0.08)]
    whole, half = (fmean(json.loads(path.read_text())["tuning"]["middle"]) for path in paths)
    assert f"one prefix of T tokens is {whole - half:.4f} lower at half the rate" in said
    assert len(rows) == 9
    assert behind == {
        ("everything trained", "long-prefix-and-backbone", "beginning"),
        *product(("backbone frozen",), ("alone", "lora"), ("beginning", "middle")),
    }


def recycled(arm, seed, aggregator=""):
    """The loss in the middle of test documents after four million recycled tokens."""
    found = (RESULTS / "evidence" / "recycling").glob(f"recycle-{arm}-*n4000000-b0.0004-r*{aggregator}-s{seed}.json")
    (path,) = (path for path in found if aggregator or "-a0." not in path.name)
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
