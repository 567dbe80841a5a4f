"""The models, tasks and runs of the study of what streams are worth."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import linear

import parscale
from parscale.scaling_laws import fit

pytestmark = pytest.mark.usefixtures("evidence")


@pytest.mark.parametrize("variant", ["", "embedding"])
def test_one_prefix_is_one_stream(variant: str) -> None:
    """Two streams with the same prefix (and vector) and equal weights give one prefix's logits, at half the cost."""
    from arms import Run, backbone, build
    from variants import apply_variant

    one: Any = build(Run(48, 2, 1, 1, 0, 1e-3, arm="prefix", variant=variant)).eval()
    torch.manual_seed(0)
    two: Any = apply_variant(variant, backbone(48, 2, 128), 2, prefix_length=8, seed=3).eval()
    ids = torch.randint(1, 256, (2, 20))
    with torch.no_grad():
        for layer, prefix in zip(two.model.model.layers, one.prefixes, strict=True):
            layer.self_attn.prefix_k.copy_(prefix[0].expand(2, -1, -1, -1))
            layer.self_attn.prefix_v.copy_(prefix[1].expand(2, -1, -1, -1))
        if variant:
            assert one.of_stream.abs().max() > 0.01
            two.of_stream.copy_(one.of_stream.expand(2, -1))
        torch.testing.assert_close(two(ids), one(ids), rtol=1e-5, atol=1e-5)


def test_a_dense_model_with_a_vector_is_one_without_whose_vector_is_zero() -> None:
    from arms import Run, build

    plain: Any = build(Run(48, 2, 1, 1, 0, 1e-3)).eval()
    with_vector: Any = build(Run(48, 2, 1, 1, 0, 1e-3, variant="embedding")).eval()
    ids = torch.randint(1, 256, (2, 20))
    with torch.no_grad():
        assert (with_vector(ids) - plain(ids)).abs().max() > 1e-3
        with_vector.of_stream.zero_()
        assert torch.equal(with_vector(ids), plain(ids))


def _shared(variant: str, layers: int = 2, streams: int = 3) -> Any:
    """A small model with streams that share keys; the same weights for each variant."""
    from arms import backbone
    from variants import apply_variant

    torch.manual_seed(0)
    model = apply_variant(variant, backbone(48, layers, 128), streams, prefix_length=4, seed=3).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "aggregate_layer.2" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(5))
            if ".prefix_" in name:
                parameter.mul_(10)
    return model


@torch.no_grad()
@pytest.mark.parametrize("variant", ["embedding", "probabilities", "shared-own"])
def test_without_streams_a_variant_is_the_backbone(variant: str) -> None:
    from arms import backbone

    ids = torch.randint(1, 256, (3, 9))  # as many rows as streams
    torch.manual_seed(0)
    expected = backbone(48, 1, 128).double().eval()(ids).logits
    model = _shared(variant, layers=1)
    assert (model(ids) - expected).abs().max() > 1e-3
    with model.model.use_streams(None):
        assert torch.equal(model(ids), expected)


@torch.no_grad()
def test_with_a_closed_gate_the_window_of_own_keys_is_none() -> None:
    ids = torch.randint(1, 256, (2, 20), generator=torch.Generator().manual_seed(1))
    model, expected = _shared("shared-window=8"), _shared("shared")(ids)
    assert (model(ids) - expected).abs().max() > 1e-3
    for gate in model.gates_of_streams:
        gate.fill_(-torch.inf)
    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_in_a_single_layer_the_own_position_is_that_of_stream_0() -> None:
    """Streams enter the first layer alike, so own and shared keys differ from the second on."""
    ids = torch.randint(1, 256, (2, 20), generator=torch.Generator().manual_seed(1))
    one, two = (_shared("shared-own", layers)(ids) for layers in (1, 2))
    torch.testing.assert_close(one, _shared("shared", 1)(ids), rtol=1e-5, atol=1e-5)
    assert (two - _shared("shared", 2)(ids)).abs().max() > 1e-3


@torch.no_grad()
def test_streams_with_the_prefix_of_stream_0_are_one_prefix() -> None:
    from arms import OnePrefix, backbone

    model = _shared("shared-prefix")
    torch.manual_seed(0)
    one = OnePrefix(backbone(48, 2, 128), 4, seed=7).double().eval()
    for layer, first, prefix in zip(model.model.model.layers, model.first_prefixes, one.prefixes, strict=True):
        first.copy_(prefix)
        layer.self_attn.prefix_k.copy_(prefix[0].expand(2, -1, -1, -1))
        layer.self_attn.prefix_v.copy_(prefix[1].expand(2, -1, -1, -1))
    ids = torch.randint(1, 256, (2, 20))
    torch.testing.assert_close(model(ids), one(ids), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("variant", "window"), [("shared-own", 1), ("shared-window=3", 3), ("shared-prefix", 0)])
def test_a_stream_attends_to_what_its_variant_says(variant: str, window: int) -> None:
    """Against a softmax over a list of keys for each query, put together token by token."""
    model = _shared(variant, layers=1)
    layer = model.model.model.layers[0].self_attn
    states = torch.randn(3, 6, 48, dtype=torch.float64)  # three streams of one row
    for parameter in model.gates_of_streams:
        parameter.copy_(torch.tensor([0.7, -0.4]))
    angle = torch.zeros(1, 6, layer.head_dim, dtype=torch.float64)
    found, _ = layer(hidden_states=states, position_embeddings=(angle.cos(), angle.sin()), attention_mask=None)
    query, key, value = (
        linear(states, project.weight, project.bias).unflatten(-1, (-1, layer.head_dim))  # of all streams' rows
        for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    for stream, token, head in product(range(3), range(6), range(2)):
        replaces = variant == "shared-own"
        seen = [(key[0, t, 0], value[0, t, 0], 0.0) for t in range(token + 1 - replaces)]
        if replaces or stream > 0:
            first = max(0, token - window + 1)
            gate = 0.0 if replaces else (0.7, -0.4)[head]
            seen += [(key[stream, t, 0], value[stream, t, 0], gate) for t in range(first, token + 1) if window]
        if stream > 0:
            seen += [(layer.prefix_k[stream - 1, 0, t], layer.prefix_v[stream - 1, 0, t], 0.0) for t in range(4)]
        elif variant == "shared-prefix":
            seen += [(k, v, 0.0) for k, v in zip(*model.first_prefixes[0][:, 0, 0], strict=True)]
        keys, values = (torch.stack([entry[i] for entry in seen]) for i in (0, 1))
        gates = torch.tensor([entry[2] for entry in seen], dtype=torch.float64)
        scores = keys @ query[stream, token, head] / layer.head_dim**0.5 + gates
        states[stream, token, head * layer.head_dim : (head + 1) * layer.head_dim] = scores.softmax(0) @ values
    torch.testing.assert_close(found, layer.o_proj(states))


@torch.no_grad()
@pytest.mark.parametrize("arm", ["streams", "prefix"])
def test_alone_a_window_with_a_closed_gate_is_none_and_an_open_one_reads_twice(arm: str) -> None:
    """Against attention to a list of keys and values in which the last three tokens stand once more."""
    from arms import Run, build

    alone: Any = build(Run(48, 1, 1, 1, 0, 1e-3, arm=arm, variant="shared-window=3")).double().eval()
    plain: Any = build(Run(48, 1, 1, 1, 0, 1e-3, arm=arm)).double().eval()
    alone.model.model.layers[0].self_attn.gate.copy_(gates := torch.tensor([0.7, -0.4]))
    ids = torch.randint(1, 256, (2, 20))

    def twice(query: Any, key: Any, value: Any, **options: Any) -> Any:
        rows = []
        for token in range(query.shape[2]):
            end = key.shape[2] - query.shape[2] + token + 1
            seen = [*range(end), *range(max(end - token - 1, end - 3), end)]
            bias = torch.zeros(2, 1, len(seen)).double()
            bias[:, 0, end:] = gates[:, None]
            rows.append(sdpa(query[:, :, token : token + 1], key[:, :, seen], value[:, :, seen], attn_mask=bias))
        return torch.cat(rows, 2)

    sdpa = torch.nn.functional.scaled_dot_product_attention
    plain.model.set_attn_implementation("sdpa")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda query, key, value, **options: twice(query, *(x.expand(-1, 2, -1, -1) for x in (key, value))),
        )
        expected = plain(ids)
    torch.testing.assert_close(alone(ids), expected, rtol=1e-5, atol=1e-5)
    alone.model.model.layers[0].self_attn.gate.fill_(-torch.inf)
    assert (alone(ids) - expected).abs().max() > 1e-3
    torch.testing.assert_close(alone(ids), plain(ids), rtol=1e-5, atol=1e-5)


def test_every_parameter_of_a_variant_trains() -> None:
    for variant in ("shared-own", "shared-window=3", "shared-prefix"):
        model = _shared(variant)
        model(torch.randint(1, 256, (2, 12))).logsumexp(-1).sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters()), variant


def test_the_dense_twin_has_the_parameters_of_four_streams() -> None:
    from arms import Run, build
    from loop import non_embedding_parameters

    four = Run(48, 4, 4, 1, 0, 1e-3)
    twin = replace(four, arm="twin")
    counts = [non_embedding_parameters(build(run)) for run in (four, twin)]
    assert abs(counts[0] - counts[1]) <= 3 * 48 * 4  # one more neuron in each layer
    assert counts[1] > non_embedding_parameters(build(replace(four, streams=1)))


@pytest.mark.parametrize("variant", ["", "left-out"])
def test_a_run_that_is_killed_comes_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    import loop
    import synthetic

    run = synthetic.TaskRun("hops", 2, 48, 1, 2, 6, 0, 1e-2, variant=variant)
    monkeypatch.setattr(synthetic, "TEST_EXAMPLES", 128)
    whole = synthetic.train(run, tmp_path / "whole", tmp_path / "whole")

    monkeypatch.setattr(loop, "EVERY_SECONDS", 0.0)  # a checkpoint after each step
    examples, calls = synthetic.examples, iter(range(4))
    with monkeypatch.context() as killed:
        killed.setattr(synthetic, "examples", lambda *args, **kwargs: (next(calls), examples(*args, **kwargs))[1])
        with pytest.raises(StopIteration):
            synthetic.train(run, tmp_path / "killed", tmp_path / "killed")
    assert not list((tmp_path / "killed").glob("*.json"))
    resumed = synthetic.train(run, tmp_path / "killed", tmp_path / "killed")
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    weights = [torch.load(tmp_path / name / run.name / "final.pt") for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_recycled_run_with_one_cache_has_a_name_of_its_own() -> None:
    from recycling import RecycleRun

    own, shared = (RecycleRun("frozen", 4, 1000, 0, kv=kv) for kv in ("own", "shared"))
    assert own.name == "recycle-frozen-p4-n1000-b0-r0-s0"  # as rows on file have it
    assert shared.name == own.name + "-shared"


def test_a_recycled_arm_has_one_row_for_a_seed() -> None:
    from recycling import RecycleRun
    from report import recycled_comparisons

    def row(rate: float, seed: int = 0) -> tuple[str, dict[str, Any]]:
        run = RecycleRun("prefix", 1, 1000, seed, streams_rate=rate)
        return run.name, {"run": asdict(run), "test": {"beginning": [1.0, 2.0], "middle": [1.0, 2.0]}}

    assert recycled_comparisons(dict([row(0.1), row(0.1, seed=1), row(0.2, seed=100)])) == []
    names = "recycle-prefix-p1-n1000-b0-r0.1-s0 and recycle-prefix-p1-n1000-b0-r0.2-s0"
    with pytest.raises(ValueError, match=f"{names} are one arm with one seed.*remove the other"):
        recycled_comparisons(dict([row(0.1), row(0.2)]))


def test_one_cache_starts_from_the_texts_of_streams_with_their_own(tmp_path: Path) -> None:
    import recycling

    starts = []
    for kv in ("own", "shared"):
        run = recycling.RecycleRun("frozen", 2, 2000, 0, kv=kv)
        (tmp_path / run.name).mkdir()
        starts.append(parscale.load(recycling._start(run, tmp_path / run.name)))
    own, shared = (start.get_decoder().layers[0].self_attn.prefix_k for start in starts)
    assert starts[1].config.parscale_kv == "shared"
    torch.testing.assert_close(shared, own[:1])


def test_untrained_streams_of_any_seed_start_from_texts(tmp_path: Path) -> None:
    import recycling

    runs = [recycling.RecycleRun("untrained", 4, 0, seed) for seed in (0, 1)]
    for run in runs:
        (tmp_path / run.name).mkdir()
    starts = [parscale.load(recycling._start(run, tmp_path / run.name)) for run in runs]
    first, second = (start.get_decoder().layers[0].self_attn.prefix_k for start in starts)
    assert first.shape == second.shape
    assert not torch.equal(first, second)


def test_answers_of_tasks_are_right() -> None:
    from tasks import EQUALS, examples

    def number(digits: Any) -> int:
        return int("".join(map(str, digits)))

    rng = np.random.default_rng(0)
    for ids in examples("add", 3, rng, 20).ids:
        assert number(ids[1:4]) + number(ids[5:8]) == number(ids[-4:])
    for ids in examples("multiply", 3, rng, 20).ids:
        assert number(ids[1:4]) * number(ids[5:7]) == number(ids[-5:])
    for ids in examples("hops", 2, rng, 20).ids:
        images = list(ids[1:11])
        assert sorted(images) == list(range(10))
        assert ids[-1] == images[images[ids[-2]]]
    for ids in examples("sort", 5, rng, 20).ids:
        assert sorted(ids[1:6]) == list(ids[-5:])
        assert ids[6] == EQUALS
    rows = examples("parity", 3, rng, 400).ids
    for answer in rows[:, -8:].T:  # of exactly one set of three bits each is the parity
        signs = 1 - 2 * rows[:, 1:25]
        products = [(signs[:, places].prod(1) == 1 - 2 * answer).all() for places in combinations(range(24), 3)]
        assert sum(products) == 1


def test_no_held_out_example_is_trained_on() -> None:
    from tasks import TASKS, examples

    for task in TASKS:
        train = examples(task, 3, np.random.default_rng(0), 500)
        test = examples(task, 3, np.random.default_rng(1), 500, held_out=True)
        prompts = [{tuple(ids) for ids in side.ids[:, : -side.answer]} for side in (train, test)]
        assert len(train.ids) == len(test.ids) == 500
        assert not prompts[0] & prompts[1]


def test_a_gain_beats_every_control_in_the_middle_over_seeds() -> None:
    from report import gains

    def entries(**changed: Any) -> list[dict[str, Any]]:
        common = {"study": "scratch", "size": "0.1M", "tokens": 10, "arm": "P = 4", "where": "middle"}
        controls = ("dense", "prefix", "long prefix")
        rows = [common | {"baseline": control, "high": -0.001, "seeds": 2} for control in controls]
        rows[1] |= changed
        return rows

    assert gains(entries()) == ["scratch, 0.1M, 10 tokens: P = 4"]
    for changed in ({"high": 0.001}, {"seeds": 1}, {"where": "beginning"}, {"baseline": "twin"}):
        assert gains(entries(**changed)) == []
    of_the_largest = [entry | {"size": "1.0M", "seeds": 8} for entry in entries()]
    assert gains(of_the_largest) == ["scratch, 1.0M, 10 tokens: P = 4"]
    assert gains([*of_the_largest[:-1], of_the_largest[-1] | {"seeds": 7}]) == []


@pytest.mark.parametrize(
    ("arm", "controls"),
    [
        ("frozen", ("untouched", "alone", "prefix", "long-prefix")),
        *(
            (arm, ("untouched", "alone", "prefix-and-backbone", "long-prefix-and-backbone"))
            for arm in ("streams-and-backbone", "streams-and-backbone, shared")
        ),
    ],
)
def test_a_recycled_model_gains_only_if_it_beats_one_prefix_too(arm: str, controls: tuple[str, ...]) -> None:
    """One that is trained as it was."""
    from report import gains

    common = {"study": "recycling", "size": "P = 4", "tokens": 10, "arm": arm, "where": "middle"}
    rows = [common | {"baseline": control, "high": -0.001, "seeds": 3} for control in controls]
    assert gains(rows) == [f"recycling, P = 4, 10 tokens: {arm}"]
    for number in range(len(rows)):
        assert gains(rows[:number] + rows[number + 1 :]) == []


@pytest.mark.parametrize("variant", ["embedding", "shared-window=8"])
def test_a_variant_gains_only_if_it_beats_what_one_of_its_streams_has(variant: str) -> None:
    from report import gains

    common = {"study": "scratch", "size": "0.1M", "tokens": 10, "arm": f"P = 4, {variant}", "where": "middle"}
    controls = ("dense", "prefix", "long prefix", f"prefix, {variant}")
    rows = [common | {"baseline": control, "high": -0.001, "seeds": 2} for control in controls]
    assert gains(rows) == [f"scratch, 0.1M, 10 tokens: P = 4, {variant}"]
    assert gains(rows[:-1]) == []
    assert gains([*rows[:-1], rows[-1] | {"high": 0.001}]) == []


@pytest.mark.parametrize(("against_prefix", "gained"), [(0.01, ["add 5: P = 4"]), (-0.01, [])])
def test_a_task_is_gained_only_against_one_prefix_too(against_prefix: float, gained: list[str]) -> None:
    from report import task_gains

    controls = {"dense": 0.2, "prefix": against_prefix, "long prefix": 0.1, "twin": -0.5}  # the twin is no control
    entries = [
        {"task": "add", "level": 5, "arm": arm, "gain of P = 4": {"low": low}, "gain of P = 2": {"low": -1.0}}
        for arm, low in controls.items()
    ]
    assert task_gains(entries) == gained
    assert task_gains(entry for entry in entries if entry["arm"] != "long prefix") == []


def test_a_task_counts_each_arm_at_its_better_rate() -> None:
    """By the mean over the seeds that both rates have, on what is for tuning; seeds for tuning do not count."""
    from report import task_results
    from synthetic import TaskRun

    def row(rate: float, seed: int, tuning: float, exact: float, streams: int = 1) -> tuple[str, dict[str, Any]]:
        run = TaskRun("sort", 10, 32, 1, streams, 10, seed, rate, arm="streams" if streams > 1 else "prefix")
        test = {"exact": exact, "tokens": exact, "loss": 1 - exact}
        return run.name, {"run": asdict(run), "params": 7, "tuning": {"loss": tuning}, "test": test}

    rows = dict(
        [
            *(row(0.01, seed, tuning, 0.5) for seed, tuning in ((0, 0.1), (1, 0.9), (2, 0.0))),
            *(row(0.02, seed, tuning, 0.7) for seed, tuning in ((0, 0.2), (1, 0.3), (100, 9.0))),
            *(row(0.04, seed, 0.0, exact, streams=4) for seed, exact in ((0, 0.8), (1, 0.9), (2, 0.1))),
        ]
    )
    streams, prefix = task_results(rows)
    assert (streams["arm"], streams["exact"]) == ("P = 4", [0.8, 0.9, 0.1])
    assert (prefix["arm"], prefix["learning_rate"], prefix["exact"]) == ("prefix", 0.02, [0.7, 0.7])
    assert prefix["gain of P = 4"]["difference"] == pytest.approx(0.15)


@pytest.mark.parametrize("k", [0.3, 0.0])
def test_the_laws_k_is_found_again(k: float) -> None:
    """Larger models read more, which is not theirs; N counts streams' parameters, or they are worth theirs too."""
    from dataclasses import asdict, replace

    from arms import Run
    from fitted_law import law
    from plan import SIZES
    from report import by_size

    rows: dict[str, Any] = {}

    def add(run: Run, streams: int) -> None:
        params = run.hidden**2 * run.layers * (20 + run.streams)
        of_size = (4e5 / (params * (k * np.log(streams) + 1))) ** 0.25
        losses = {
            where: [(1 + 1e-3 * run.seed) * (of_size + (3e5 / run.tokens) ** 0.4)] for where in ("beginning", "middle")
        }
        rows[run.name] = {"run": asdict(run), "params": params, "text": "", "tuning": losses, "test": losses}

    for size, seed, streams in product(("0.1M", "0.2M", "0.4M"), (0, 1), (1, 2, 4)):
        run = Run(*SIZES[size][:2], streams, SIZES[size][2], seed, 8e-3)
        add(run, streams)
        add(replace(run, streams=4, arm="twin"), 1)
        add(replace(run, streams=1, hidden=2 * run.hidden), 1)
    add(replace(Run(*SIZES["0.1M"][:2], 1, SIZES["0.1M"][2], 7, 8e-3)), 1)  # of a seed without streams
    found = law(by_size(rows), draws=20)
    assert found is not None
    assert (found["models"], found["sizes"]) == (3 * 2 * (3 + 2), 3)
    assert found["N"]["all parameters"]["k"] == pytest.approx(k, abs=0.01)
    low, high = found["N"]["all parameters"]["k_interval"]
    assert low - 1e-3 <= k <= high + 1e-3
    assert found["N"]["the backbone's parameters"]["k"] > k + 0.02
    assert found["k_without"] == pytest.approx(dict.fromkeys(("0.1M", "0.2M", "0.4M"), k), abs=0.02)
    assert law(by_size({name: row for name, row in rows.items() if row["run"]["layers"] < 6})) is None


def test_without_tokens_dense_models_called_streams_have_a_k_below_zero() -> None:
    """Why the law has a term in tokens: in the published rows N alone takes what more training is worth."""
    from report import RESULTS, by_size, read_rows

    found = by_size(read_rows(RESULTS / "evidence"))
    points = [
        (row["params"], streams, fmean(row["test"]["middle"]))
        for arms in found.values()
        for arm, streams in (("dense", 1), ("twin", 4))
        for row in arms.get(arm, {}).values()
    ]
    law = fit(*zip(*points, strict=True), bootstrap=100)
    assert law.intervals is not None
    assert law.intervals["k"][1] < 0


def test_the_study_follows_when_its_rates_are_tuned() -> None:
    from plan import plan

    rows: dict[str, Any] = {}
    for _ in range(1000):
        missing = [run for run in plan(rows) if run.name not in rows]
        if not missing:
            break
        rate = getattr(missing[0], "learning_rate", 8e-3)
        loss = abs(np.log2(rate / 4e-3))  # so that 4e-3 is best everywhere
        rows[missing[0].name] = {"tuning": {"middle": [loss], "loss": loss}, "run": missing[0]}
    scratch = [row["run"] for row in rows.values() if hasattr(row["run"], "layers") and not hasattr(row["run"], "task")]
    widths = {run.hidden for run in scratch}
    assert {48, 64, 80, 96, 128} <= widths
    of_study = [run for run in scratch if run.hidden == 64]
    assert {run.learning_rate for run in of_study} == {4e-3}
    assert {(run.arm, run.streams, run.prefix_length) for run in of_study} == {
        ("streams", 1, 8),
        ("streams", 2, 8),
        ("streams", 4, 8),
        ("prefix", 1, 8),
        ("prefix", 1, 32),
        ("twin", 4, 8),
    }


def test_the_average_of_models_is_that_of_their_probabilities() -> None:
    from ensembles import Average

    class Fixed(torch.nn.Module):
        def __init__(self, probabilities: list[float]) -> None:
            super().__init__()
            self.logits = torch.tensor(probabilities).log() + 3.0  # logits have no zero of their own

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.logits.expand(*ids.shape, -1)

    average = Average([Fixed([0.5, 0.25, 0.25]), Fixed([0.1, 0.1, 0.8])])
    found = average(torch.zeros(2, 3, dtype=torch.long)).exp()
    torch.testing.assert_close(found, torch.tensor([0.3, 0.175, 0.525]).expand(2, 3, -1))
