"""Comparison by held-out runs."""

import numpy as np
import pytest

from parscale.scaling_laws import ParallelScalingLaw, compare, fit, leave_one_out, published


@pytest.mark.parametrize("corpus", ["stack", "pile"])
def test_the_papers_law_predicts_held_out_streams_best(corpus):
    rows = {row.form: row for row in compare(*published(corpus))}
    assert next(iter(rows)) == "log"
    assert rows["log"].streams_error < 0.7 * rows["power"].streams_error < 0.7 * rows["rho"].streams_error
    assert rows["dense"].streams_error > 3 * rows["log"].streams_error
    assert rows["log"].r2 > rows["power"].r2 > rows["rho"].r2 > rows["dense"].r2


def test_held_out_runs_are_predicted_by_the_others_alone():
    points = published("pile")
    rest = points.streams != 8
    expected = fit(*(column[rest] for column in points)).predict(points.params[~rest], 8)
    held_out = leave_one_out(*points, by="streams")[-1]
    assert held_out.group == "P = 8"
    np.testing.assert_allclose(held_out.predicted, expected)
    np.testing.assert_array_equal(held_out.actual, points.losses[~rest])
    spoiled = points.losses.copy()
    spoiled[~rest] *= 2
    again = leave_one_out(points.params, points.streams, spoiled, by="streams")[-1]
    np.testing.assert_array_equal(again.predicted, held_out.predicted)


def test_each_size_is_held_out_with_all_its_streams():
    groups = leave_one_out(*published("stack"), by="size")
    assert [group.group for group in groups][:2] == ["N = 5.358e+08", "N = 6.938e+08"]
    assert [group.actual.size for group in groups] == [4] * 6


def test_a_law_without_noise_predicts_what_it_has_not_seen():
    points = published("stack")
    exact = ParallelScalingLaw(0.7, 1e7, 0.2, 0.4).predict(points.params, points.streams)
    row = compare(points.params, points.streams, exact, forms=["log"])[0]
    assert row.size_error < 1e-6
    assert row.streams_error < 1e-6


def test_too_few_groups_are_said():
    points = published("stack")
    two = points.streams <= 2
    some = [column[two] for column in points]
    with pytest.raises(ValueError, match="holding out one P of 2 leaves too few"):
        leave_one_out(*some, by="streams")
    assert np.isnan(compare(*some, forms=["log"])[0].streams_error)
    with pytest.raises(ValueError, match="by is 'corpus'; give 'size' or 'streams'"):
        leave_one_out(*some, by="corpus")


def test_runs_with_streams_at_one_size_are_compared():
    """Without that size, the others say nothing of streams; without P = 1, one size says nothing of sizes."""
    law = ParallelScalingLaw(0.7, 1e7, 0.2, 0.4)
    runs = [(1e8, 1), (2e8, 1), (4e8, 1), (8e8, 1), (4e8, 2), (4e8, 4)]
    params, streams = np.array(runs).T
    row = compare(params, streams, law.predict(params, streams), forms=["log"])[0]
    assert row.values["k"] == pytest.approx(0.4, abs=1e-3)
    assert np.isnan(row.size_error)
    assert np.isnan(row.streams_error)
    assert [each.form for each in compare(params, streams, law.predict(params, streams))]
