"""Comparison with the plain model of equal loss, crossovers, and the best use of a budget."""

import numpy as np
import pytest

from parscale.scaling_laws import (
    ParallelScalingLaw,
    cost,
    crossover,
    dense_equivalent,
    frontier,
    optimal,
    published_models,
    versus,
)

LAW = ParallelScalingLaw(E=0.6912, A=1.131e7, alpha=0.1894, k=0.3935)
MODEL = published_models()["1.6B"]


def test_the_dense_model_has_the_same_predicted_loss():
    dense = dense_equivalent(LAW, MODEL, 8)
    streams = cost(MODEL, num_streams=8, batch_size=1, input_length=1, output_length=1).params
    assert LAW.predict(dense.params(1), 1) == pytest.approx(LAW.predict(streams, 8), rel=1e-9)
    assert dense.layers == 36


def test_ratios_are_those_of_the_costs():
    comparison = versus(LAW, MODEL, num_streams=4, batch_size=2)
    assert comparison.ratio("seconds") == comparison.streams.seconds / comparison.dense.seconds


def test_streams_win_at_batch_one_and_lose_at_a_large_batch():
    small = versus(LAW, MODEL, num_streams=8, batch_size=1)
    assert small.ratio("seconds") < 0.7
    assert small.ratio("memory_bytes") < 0.7
    large = versus(LAW, MODEL, num_streams=8, batch_size=64)
    assert large.ratio("seconds") > 2
    assert large.ratio("memory_bytes") > 1.5


@pytest.mark.parametrize("quantity", ["seconds", "memory_bytes"])
@pytest.mark.parametrize("along", ["batch_size", "input_length"])
def test_the_crossover_is_where_the_ratio_passes_one(quantity, along):
    at = crossover(LAW, MODEL, num_streams=4, quantity=quantity, along=along)
    assert versus(LAW, MODEL, num_streams=4, **{along: at - 1}).ratio(quantity) <= 1
    assert versus(LAW, MODEL, num_streams=4, **{along: at}).ratio(quantity) > 1


EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
MIXTURE = MODEL | EXPERTS | {"model_type": "qwen3_moe"}


@pytest.mark.parametrize(("shape", "along"), [(MIXTURE, "batch_size"), (MODEL, "output_length")])
def test_streams_that_lose_at_one_may_win_before_they_lose_for_good(shape, along):
    """A mixture's few rows load few experts, and P streams of one token more of them; one token is a prefill alone."""
    ratios = {
        value: versus(LAW, shape, num_streams=4, **{along: value}).ratio("seconds")
        for value in (2**power for power in range(21))
    }
    at = crossover(LAW, shape, num_streams=4, along=along)
    assert ratios[1] > 1 > min(ratios.values())
    if at is None:
        assert ratios[2**20] <= 1
    else:
        assert all(ratio > 1 for value, ratio in ratios.items() if value >= at)
        assert versus(LAW, shape, num_streams=4, **{along: at - 1}).ratio("seconds") <= 1


def test_no_crossover_is_said_so():
    """Nobody needs more streams if they are free: k so large that no batch makes the dense model cheaper."""
    free = ParallelScalingLaw(E=0.7, A=1e7, alpha=0.2, k=20)
    assert crossover(free, MODEL, num_streams=2, quantity="seconds") is None


def test_slow_arithmetic_makes_streams_lose_sooner():
    assert crossover(LAW, MODEL, num_streams=8, hardware="cpu-desktop") < crossover(LAW, MODEL, num_streams=8)


def test_impossible_comparisons_are_refused_by_name():
    with pytest.raises(ValueError, match="quantity is 'joules'; give one of seconds, memory_bytes"):
        crossover(LAW, MODEL, num_streams=2, quantity="joules")
    with pytest.raises(ValueError, match="along is 'width'; give one of batch_size"):
        crossover(LAW, MODEL, num_streams=2, along="width")
    with pytest.raises(ValueError, match="with one stream there is nothing to compare"):
        crossover(LAW, MODEL, num_streams=1)
    with pytest.raises(ValueError, match="num_streams is 0"):
        versus(LAW, MODEL, num_streams=0)


def test_training_compute_is_best_spent_on_a_plain_model():
    plan = optimal(LAW, MODEL, train_flops=1e21)
    assert plan.streams == 1
    assert plan.params == pytest.approx(1e21 / (6 * 42e9), rel=1e-6)
    eager = ParallelScalingLaw(E=0.69, A=1.13e7, alpha=0.19, k=2.0)
    assert optimal(eager, MODEL, train_flops=1e21).streams == 2  # exp(1 - 1/2) = 1.6


@pytest.mark.parametrize("budget", [{"memory_bytes": 4e9}, {"seconds": 0.5}, {"memory_bytes": 5e9, "seconds": 0.5}])
def test_budgets_are_kept_and_nothing_better_keeps_them(budget):
    plan = optimal(LAW, MODEL, **budget)
    for name, limit in budget.items():
        assert plan.costs[name] <= limit
    assert plan.loss == pytest.approx(LAW.predict(plan.params, plan.streams))
    assert plan.streams > 1  # memory and latency at batch 1 are what streams save
    work = {"batch_size": 1, "input_length": 256, "output_length": 256}
    for streams in (1, 2, 4, 8, 16, 32):
        for width in np.linspace(0.3, 1.5, 40):
            shape = plan.shape.scaled(width)
            other = cost(shape, num_streams=streams, **work)
            if all(getattr(other, name) <= limit for name, limit in budget.items()):
                assert LAW.predict(other.params, streams) >= plan.loss - 1e-9


def test_a_large_batch_wants_fewer_streams():
    one, many = (optimal(LAW, MODEL, memory_bytes=8e9, batch_size=batch).streams for batch in (1, 64))
    assert many < one


def test_the_frontier_has_each_number_of_streams_once():
    plans = frontier(LAW, MODEL, memory_bytes=4e9, streams=(1, 2, 4))
    assert [plan.streams for plan in plans] == [1, 2, 4]
    assert min(plan.loss for plan in plans) == optimal(LAW, MODEL, memory_bytes=4e9, streams=(1, 2, 4)).loss


@pytest.mark.parametrize("kv", ["own", "shared"])
def test_parameters_are_those_of_what_is_planned(kv):
    (plan,) = frontier(LAW, MODEL, memory_bytes=8e9, streams=(4,), kv=kv)
    assert plan.params == cost(plan.shape, num_streams=4, batch_size=1, input_length=8, output_length=8, kv=kv).params
    dense = dense_equivalent(LAW, plan.shape, 4, kv=kv)
    assert LAW.predict(dense.params(1), 1) == pytest.approx(plan.loss, rel=1e-9)


def test_impossible_budgets_are_refused_by_name():
    with pytest.raises(ValueError, match="no budget given; give at least one of train_flops, memory_bytes, seconds"):
        optimal(LAW, MODEL)
    with pytest.raises(ValueError, match="seconds is -1; it must be above 0"):
        optimal(LAW, MODEL, seconds=-1)
    with pytest.raises(ValueError, match="no width of this model keeps memory_bytes = 1000 at any of P"):
        optimal(LAW, MODEL, memory_bytes=1000)
