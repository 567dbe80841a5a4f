"""Controls: intervals against closed forms and against how often they cover the truth, and what arms are."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from scipy.stats import ttest_1samp
from small_models import small_llama

from parscale import ParScaleConfig
from parscale.checkpoints.evaluation.controls import ARMS, HELD_AGAINST, crossed_interval, hold_against, prepare_arm
from parscale.checkpoints.evaluation.text_loss import DocumentLoss, Evaluation
from parscale.streams.naming import part_of

BY_NAME = {arm.name: arm for arm in ARMS}


# -- intervals


def test_one_seed_is_the_t_interval_over_documents():
    differences = [-1.0, -2.0, -3.0]
    interval = crossed_interval([differences])
    expected = ttest_1samp(differences, 0.0).confidence_interval()
    assert (interval.difference, interval.seeds, interval.documents) == (-2.0, 1, 3)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_seeds_that_differ_alone_are_the_t_interval_over_seeds():
    # every document alike: mean 2, standard deviation 1 over three seeds
    interval = crossed_interval(np.repeat([[1.0], [2.0], [3.0]], 50, axis=1))
    assert (interval.low, interval.high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))


def test_documents_that_differ_alone_are_the_t_interval_over_documents():
    interval = crossed_interval(np.repeat([[1.0, 2.0, 3.0]], 4, axis=0))
    assert (interval.low, interval.high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))


def test_both_factors_by_hand():
    # rows and columns -5 to 5 and no rest: MS 121 each, so 20 degrees of freedom, t 2.085963
    steps = np.arange(-5.0, 6.0)
    interval = crossed_interval(steps[:, None] + steps)
    assert (interval.low, interval.high) == pytest.approx((-2.085963 * 2**0.5, 2.085963 * 2**0.5))


def test_both_factors_and_a_rest_by_hand():
    """MS of 121, 121 and 30.25 with 10, 10 and 100 degrees of freedom."""
    steps = np.arange(-5.0, 6.0)
    interval = crossed_interval(steps[:, None] + steps + steps[:, None] * steps / 2)
    free = 211.75**2 / (2 * 121**2 / 10 + 30.25**2 / 100)
    assert interval.high == pytest.approx(student.ppf(0.975, free) * 1.75**0.5, rel=1e-6)


@pytest.mark.parametrize("seeds", [2, 3, 4])
@pytest.mark.parametrize(("of_seeds", "of_documents"), [(0.0, 1.0), (0.2, 1.0), (1.0, 1.0), (1.0, 5.0)])
def test_covers_the_truth_at_least_about_as_often_as_it_says(seeds, of_seeds, of_documents):
    draw = np.random.default_rng(0)
    runs, covered = 2000, 0
    for _ in range(runs):
        table = (
            0.3
            + of_seeds * draw.standard_normal((seeds, 1))
            + of_documents * draw.standard_normal((1, 30))
            + draw.standard_normal((seeds, 30))
        )
        interval = crossed_interval(table)
        covered += interval.low <= 0.3 <= interval.high
    assert covered / runs > 0.95 - 4 * (0.95 * 0.05 / runs) ** 0.5  # four standard errors


@pytest.mark.parametrize("table", [[1.0, 2.0], [[1.0]], np.zeros((0, 3))])
def test_what_is_no_table_is_refused(table):
    with pytest.raises(ValueError, match="a row for each seed and at least 2 documents"):
        crossed_interval(table)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(wrong):
    with pytest.raises(ValueError, match=r"^2 of 6 differences are NaN or infinite.*measure it again, or leave it out"):
        crossed_interval([[1.0, wrong, 2.0], [1.0, -wrong, 2.0]])


# -- comparisons


def evaluation(losses, names="abc", sequence_length=32):
    documents = tuple(DocumentLoss(name, loss, 10) for name, loss in zip(names, losses, strict=True))
    return {"middle": Evaluation(0.0, 1.0, 30, sequence_length, documents)}


def test_arms_are_paired_by_seed_and_document():
    streams = [evaluation([1.0, 2.0, 3.0]), evaluation([2.0, 3.0, 4.0])]
    (entry,) = hold_against(
        "frozen", "untouched", "code", {"frozen": streams, "untouched": [evaluation([1.5, 2.5, 3.5])]}, 1000
    )
    expected = crossed_interval([[-0.5] * 3, [0.5] * 3])
    assert entry == {
        "arm": "frozen",
        "baseline": "untouched",
        "text": "code",
        "where": "middle",
        "tokens": 1000,
        "difference": 0.0,
        "low": expected.low,
        "high": expected.high,
        "seeds": 2,
        "documents": 3,
    }


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ([evaluation([1.0, 2.0, 3.0], names="abd")], "used different documents; measure all models on the same"),
        ([evaluation([1.0, 2.0, 3.0], sequence_length=16)], "windows of 16 and 32 tokens; measure all models with"),
        ([evaluation([1.0, 2.0, 3.0])] * 2, "3 and 2 seeds"),
    ],
)
def test_what_cannot_be_paired_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        hold_against("a", "b", "code", {"a": [evaluation([1.0, 2.0, 3.0])] * 3, "b": other}, 1)


# -- arms


@pytest.fixture(scope="module")
def plain():
    return small_llama(initializer_range=0.2, eos_token_id=0)


CONFIG = ParScaleConfig(3, 4, seed=0)
IDS = torch.arange(60).remainder(61).view(5, 12)


@pytest.mark.parametrize(("name", "length"), [("prefix", 4), ("long-prefix", 12)])
def test_one_prefix_stays_one_under_training(plain, name, length):
    texts = torch.randint(1, 64, (3, 12), generator=torch.Generator().manual_seed(1))
    model = prepare_arm(BY_NAME[name], copy.deepcopy(plain), CONFIG, texts).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    prefixes = [parameter for key, parameter in model.named_parameters() if ".prefix_" in key]
    assert prefixes
    assert all(prefix.shape[2] == length for prefix in prefixes)
    before = [prefix.clone() for prefix in prefixes]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(5):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for prefix, start in zip(prefixes, before, strict=True):
        assert not torch.equal(prefix, start)
        torch.testing.assert_close(prefix[0], prefix[1], rtol=0, atol=1e-5)
    # and the mixture is each of the two
    report = model.eval().stream_report(IDS)
    loss = model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(report.losses, loss.detach().expand(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["prefix-and-backbone", "long-prefix-and-backbone"])
def test_rounding_tells_no_two_prefixes_apart(name):
    """At sizes whose rows are not all added up in the same order, and a rate at which a difference would grow."""
    model = small_llama(hidden_size=72, num_attention_heads=3, num_key_value_heads=1, num_hidden_layers=3)
    drawn = torch.Generator().manual_seed(1)
    prepare_arm(BY_NAME[name], model, ParScaleConfig(4, 7, seed=0), torch.randint(0, 64, (4, 7), generator=drawn))
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    of_streams = [parameter for key, parameter in model.named_parameters() if part_of(key) is not None]
    backbone = [parameter for key, parameter in model.named_parameters() if part_of(key) is None]
    optimizer = torch.optim.Adam([{"params": of_streams, "lr": 0.16}, {"params": backbone, "lr": 4e-4}])
    for _ in range(25):
        ids = torch.randint(0, 64, (3, 37), generator=drawn)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, parameter in model.named_parameters():
        if part_of(key) == "transform":
            torch.testing.assert_close(parameter[0], parameter[1], rtol=0, atol=1e-3)
        elif part_of(key) == "aggregator":
            assert torch.equal(parameter, before[key])


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_what_an_arm_trains(plain, arm):
    texts = torch.randint(1, 64, (3, 12), generator=torch.Generator().manual_seed(1))
    model = prepare_arm(arm, copy.deepcopy(plain), CONFIG, texts)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_streams = {name for name, _ in model.named_parameters() if ".prefix_" in name or "aggregate_layer" in name}
    backbone = {name for name, _ in plain.named_parameters()}
    expected = {
        "nothing": set(),
        "backbone": backbone,
        "adapter": backbone,
        "streams": of_streams,
        "both": backbone | of_streams,
    }[arm.trains]
    assert trains == expected
    assert getattr(model, "num_streams", 1) == (3 if arm.streams else 2 if arm.prefix else 1)


@pytest.mark.parametrize("transform", ["prefix", "prompt"])
def test_a_long_prefix_is_those_of_the_streams_one_behind_the_other(plain, transform):
    texts = torch.randint(1, 64, (3, 4), generator=torch.Generator().manual_seed(1))
    config = dataclasses.replace(CONFIG, transform=transform)
    of_streams = prepare_arm(BY_NAME["frozen"], copy.deepcopy(plain), config, texts).state_dict()
    one = prepare_arm(BY_NAME["long-prefix"], copy.deepcopy(plain), config, texts).state_dict()
    names = [name for name in one if part_of(name) == "transform"]
    assert names
    for name in names:
        assert torch.equal(one[name][0], one[name][1])
        parts = one[name][0].split(4, dim=-2)
        assert all(torch.equal(part, own) for part, own in zip(parts, of_streams[name], strict=True))


def test_one_prefix_needs_texts_of_its_length(plain):
    for calibration, given in ((None, "none"), (IDS[:3, :2], "3 of 2 tokens"), (IDS[:2, :8], "2 of 8 tokens")):
        with pytest.raises(ValueError, match=rf"One prefix of 12 tokens starts from 3 texts of 4 .*\(it is {given}\)"):
            prepare_arm(BY_NAME["long-prefix"], copy.deepcopy(plain), CONFIG, calibration)


def test_every_arm_is_held_against_arms_that_stand_before_it():
    order = [arm.name for arm in ARMS]
    for name, baselines in HELD_AGAINST.items():
        assert all(order.index(baseline) < order.index(name) for baseline in baselines)
    assert set(HELD_AGAINST) | {"untouched"} == set(order)
