"""The README's Python runs as it stands, in one namespace and an empty folder; its figures are those on file."""

import re

import pytest
from figures_on_file import ROOT, on_file, with_interval

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
SEEDS = {2: "two seeds", 3: "three seeds", 5: "five seeds"}
LARGEST = (("P = 2", "0.7M"), ("P = 4", "1.0M"))  # the largest sizes of several seeds
FOLDERS = ("parscale", "kernels", "checkpoints", "scaling_laws", "examples", "benchmarks", "docs", "tests")


def evidence(part):
    """A part of the evidence, such as its comparisons."""
    return on_file("evidence.json")[part]


def compared(study, size):
    """Its comparisons by arm, baseline and place, recycled with 250 thousand tokens."""
    entries = [
        entry
        for entry in evidence("comparisons")
        if (entry["study"], entry["size"]) == (study, size) and (study == "scratch" or entry["tokens"] == 250_000)
    ]
    return {(entry["arm"], entry["baseline"], entry["where"]): entry for entry in entries}


def is_said(sentence):
    return sentence in " ".join(README.split())


def test_the_readme_has_at_most_170_lines():
    assert len(README.splitlines()) <= 170


@pytest.mark.slow
def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert len(BLOCKS) == 2
    namespace: dict[str, object] = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["four-streams", "wide-streams"]


def test_the_folders_are_listed():
    tree = "\n".join(line for line in README.splitlines() if line.startswith("    "))
    assert all(f"{folder}/" in tree for folder in FOLDERS)


def test_the_counts_of_architectures_are_those_on_file():
    page = (ROOT / "docs" / "architectures.md").read_text()
    some, built, prefix = map(
        int, re.search(r"(\d+) of the (\d+) classes .*? can be built small, (\d+) by a prefix", README).groups()
    )
    counts = {
        row[0]: [int(cell) for cell in row[1:]]
        for row in re.findall(r"^\| ([a-z ]+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.M)
    }
    assert sum(counts["prefix"][:2]) == built
    assert (counts["any of them"][0], counts["prefix"][0]) == (some, prefix)


@pytest.mark.parametrize(
    ("baselines", "title"),
    [
        (("dense", "dense"), "the dense model, P = 1"),
        (("prefix", "prefix"), "one trained prefix of T tokens"),
        (("prefix, T = 16", "long prefix"), "one trained prefix of P T tokens"),
        (("long prefix", ""), "one trained prefix of 4 T tokens"),
        (("twin", "twin"), "a dense model of as many parameters as P = 4"),
        (("average of 2", ""), "P dense models, averaged"),
    ],
)
def test_the_figures_against_controls_are_those_on_file(baselines, title):
    cells = []
    for (arm, size), baseline in zip(LARGEST, baselines, strict=True):
        for where in ("beginning", "middle"):
            entry = compared("scratch", size).get((arm, baseline, where))
            cells.append("" if entry is None else in_a_cell(entry))
            assert entry is None or entry["documents"] == 561
    assert " | ".join([f"| {title}", *cells]).replace("  ", " ").strip() in README


def in_a_cell(entry):
    """Of one seed there is no interval over seeds; of others than three their number is said."""
    if entry["seeds"] == 1:
        return f"{entry['difference']:+.4f} (one seed)"
    return with_interval(entry) if entry["seeds"] == 3 else f"{with_interval(entry)}, {SEEDS[entry['seeds']]}"


def test_what_recycled_streams_add_to_each_control_is_on_file():
    about = {"size": "P = 4", "arm": "streams-and-backbone, aggregator's rate", "where": "middle", "tokens": 250_000}
    found = {e["baseline"]: e for e in evidence("comparisons") if about.items() <= e.items()}
    alone, short, long = (found[name] for name in ("alone", "prefix-and-backbone", "long-prefix-and-backbone"))
    of_alone = f"by {with_interval(alone)} nats per token of the backbone alone"
    assert is_said(f"{of_alone}, {with_interval(short)} of one prefix of T tokens, {with_interval(long)} of P T.")
    assert all(entry["seeds"] == 3 and entry["high"] < 0 for entry in (alone, short, long, found["untouched"]))
    (one_rate,) = (
        entry
        for entry in evidence("comparisons")
        if (about | {"arm": "streams-and-backbone", "baseline": "prefix-and-backbone"}).items() <= entry.items()
    )
    assert one_rate["low"] < 0 < one_rate["high"]


def test_what_streams_add_in_sorting_is_on_file():
    by_arm = {entry["arm"]: entry for entry in evidence("tasks") if entry["task"] == "sort"}
    dense, prefix, longer = (by_arm[arm]["gain of P = 4"] for arm in ("dense", "prefix", "long prefix"))
    more = "{difference:+.3f} ({low:+.3f}, {high:+.3f})".format(**dense)
    assert is_said(f"In sorting ten numbers, four streams get {more} of the answers more than the dense model")
    assert is_said("and one trained prefix gets as many")
    assert prefix["low"] < 0 < prefix["high"]
    assert longer["high"] < 0
    assert dense["seeds"] == prefix["seeds"] == longer["seeds"] == 6


def test_what_one_cache_costs_is_on_file():
    entry = compared("scratch", "0.1M")["P = 4, shared", "P = 4", "middle"]
    assert is_said(f"costs nothing that {SEEDS[entry['seeds']]} could show from scratch, {with_interval(entry)}")
    frozen = compared("recycling", "P = 4")["frozen, shared", "frozen", "middle"]
    assert is_said(f"recycled on a frozen backbone it costs {with_interval(frozen)}.")
    assert frozen["seeds"] == entry["seeds"]
    assert entry["low"] < 0 < frozen["low"]


def test_what_became_of_streams_is_on_file():
    found = evidence("mixing")
    published = [entry for entry in found if entry["arm"] == "P = 4"]
    correlations = [value for entry in published if entry["size"] == "0.1M" for value in entry["correlations"]]
    assert is_said(f"their token losses correlate by {min(correlations):.2f} to {max(correlations):.2f}.")
    (even,) = (entry for entry in found if entry["arm"] == "P = 4, smoothing=1")
    assert min(even["correlations"]) > 0.98
    assert is_said("streams are ahead of the dense model, but not of a prefix at its cost.")
    (four,) = (e["best_less_mixed"] for e in found if (e["arm"], e["size"]) == ("P = 4", "1.0M"))
    settled = sorted(four)[:2]
    assert is_said(
        f"with two seeds of three, one of the four does all the work: alone it loses at most {settled[1]:.4f} more."
    )


def test_the_table_less_the_seeds_that_chose_it_is_on_file():
    (two,) = (
        entry
        for entry in evidence("confirmation")
        if (entry["arm"], entry["size"], entry["baseline"], entry["where"]) == (*LARGEST[0], "dense", "middle")
    )
    assert is_said(f"over the other two seeds, two streams are {with_interval(two)} from the dense model.")
    assert two["low"] < 0 < two["high"]


@pytest.mark.parametrize(("arm", "size"), LARGEST)
def test_larger_streams_are_ahead_of_the_dense_model_and_of_no_prefix(arm, size):
    against = compared("scratch", size)
    assert against[arm, "dense", "middle"]["high"] < 0
    prefixes = [
        entry
        for (one, other, where), entry in against.items()
        if one == arm and "prefix" in other and where == "middle"
    ]
    assert len(prefixes) >= 2
    for entry in prefixes:
        assert entry["low"] < 0 < entry["high"]
        assert entry["seeds"] > 1


def test_the_laws_k_is_on_file():
    law = evidence("law")
    found = law["N"]["all parameters"]
    low, high = found["k_interval"]
    fitted = f"In {law['models']} models of our own at 0.1 to 1.0 million, k = {found['k']:.2f}"
    without = law["k_without"]["0.1M"]
    assert is_said(f"{fitted}, 90 % interval ({low:.2f}, {high:.2f}), and {without:.2f} without the smallest size.")
    assert low < 0 < 0.39 < high
    assert law["sizes"] == 5


def test_the_batches_of_a_larger_model_are_those_counted():
    counted = (ROOT / "docs" / "shared.md").read_text()
    batches = dict(re.findall(r"^\| (\d) \| own \| batch (\d+) \|", counted, flags=re.M))
    assert is_said(f"from batch {batches['8']} (P = 8), {batches['4']} (P = 4) or {batches['2']} (P = 2) on")


@pytest.mark.parametrize("baseline", ["twice as wide", "average of 4"])
def test_what_is_better_where_memory_allows_it(baseline):
    found = compared("scratch", "0.1M")
    for where in ("beginning", "middle"):
        assert found["P = 4", baseline, where]["low"] > 0.03


def test_no_gain_is_claimed_that_the_rule_does_not_give():
    gains = evidence("gains")
    assert gains == []
    assert "**Nowhere yet that is checked to the end.**" in README
