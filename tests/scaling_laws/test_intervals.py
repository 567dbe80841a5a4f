"""Intervals: right coverage on data from known laws, and agreement with a profile computed by other means."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq, least_squares

from parscale.scaling_laws import ParallelScalingLaw, fit, fit_form, published
from parscale.scaling_laws.intervals import bootstrap, calibrated_limits, corrected_percentiles

TRUTH = ParallelScalingLaw(E=0.69, A=1.13e7, alpha=0.189, k=0.39)
NAMES = ("E", "A", "alpha", "k")


def noisy(noise, seed):
    points = published("stack")
    exact = TRUTH.predict(points.params, points.streams)
    return points.params, points.streams, exact * np.exp(np.random.default_rng(seed).normal(0, noise, exact.size))


@pytest.mark.slow
@pytest.mark.nightly
def test_intervals_cover():
    """Nominal 90 %. Over 200 draws the measured share has a standard error of 2.1 %; `benchmarks/law.py` measures more.

    The noise is that of the published runs, which scatter by 2.0e-3 and 2.7e-3 in log loss.
    """
    hits = {"bootstrap": [], "profile": []}
    for seed in range(200):
        points = noisy(2e-3, seed)
        result = fit_form("log", *points, bootstrap=100, seed=seed)
        for kind, intervals in (("bootstrap", result.intervals), ("profile", result.profile_intervals())):
            hits[kind].append([low <= getattr(TRUTH, name) <= high for name, (low, high) in intervals.items()])
        law = ParallelScalingLaw(**result.values, draws=result.draws, freedom=result.optimum.degrees_of_freedom)
        low, high = law.predict_interval(1e10, 16)  # a model beyond the largest run
        hits["bootstrap"][-1].append(low <= TRUTH.predict(1e10, 16) <= high)
    shares = {kind: np.mean(rows, axis=0) for kind, rows in hits.items()}
    for share in shares.values():
        assert ((share >= 0.85) & (share <= 0.95)).all(), shares


def test_profile_agrees_with_least_squares():
    """With noise far below delta Huber's loss is a square: the interval is where the residual sum of squares, minimised
    by scipy over the other parameters, has risen by the F quantile.
    """
    params, streams, losses = noisy(1e-4, 5)

    def squares(k):
        def residuals(theta):
            floor, scale, alpha = np.exp(theta[0]), theta[1], theta[2]
            power = np.exp(alpha * (scale - np.log(params * (k * np.log(streams) + 1))))
            return 1e4 * (np.log(losses) - np.log(floor + power))

        start = [np.log(TRUTH.E), np.log(TRUTH.A), TRUTH.alpha]
        return least_squares(residuals, start, x_scale=[0.1, 0.1, 0.01], xtol=1e-15, ftol=1e-15, gtol=1e-15).fun

    result = fit_form("log", params, streams, losses)
    lowest = (squares(result.values["k"]) ** 2).sum()
    limit = lowest * (1 + stats.f.ppf(0.9, 1, 20) / 20)

    def rise(k):
        return (squares(k) ** 2).sum() - limit

    low, high = result.profile_intervals()["k"]
    k = result.values["k"]
    expected = brentq(rise, k - 0.02, k), brentq(rise, k, k + 0.02)
    # The profile is read off between steps of a hundredth of a standard error.
    assert (low, high) == pytest.approx(expected, abs=0.02 * (high - low))


def test_noise_of_the_bootstrap_has_the_size_of_the_fits():
    """24 points and 4 parameters: the sum of the squared residuals over 20."""
    optimum = fit_form("log", *published("stack")).optimum
    noise = bootstrap(optimum, 500, 0).log_losses - optimum.fitted
    assert noise.std() == pytest.approx(np.sqrt((optimum.residuals**2).sum() / 20), rel=0.02)


def test_limits_of_the_bootstrap_are_the_f_distributions_where_the_law_is_straight():
    """With noise so small that the law is straight over all draws, the ratio follows F with 1 and 20 degrees of
    freedom; a quantile of 2000 draws has a standard error of 3 %, and the resampled residuals are not quite normal.
    """
    optimum = fit_form("log", *noisy(1e-5, 3)).optimum
    limits = calibrated_limits(optimum, bootstrap(optimum, 2000, 0), 0.9)
    np.testing.assert_allclose(limits, stats.f.ppf(0.9, 1, 20), rtol=0.12)


def test_wider_level_wider_interval():
    result = fit_form("log", *published("pile"))
    narrow, wide = result.profile_intervals(0.5), result.profile_intervals(0.95)
    for name, value in result.values.items():
        assert wide[name][0] < narrow[name][0] < value < narrow[name][1] < wide[name][1]


def test_what_the_runs_do_not_settle_is_not_guessed():
    """Few sizes and strong noise: any floor from 0 up explains them, and hardly any scale is excluded."""
    params = [1e8, 2e8, 1e8, 2e8, 1.5e8, 1.5e8]
    streams = [1, 1, 2, 2, 1, 2]
    losses = [2.0, 1.9, 1.97, 1.86, 1.96, 1.9]
    intervals = fit_form("log", params, streams, losses).profile_intervals()
    assert intervals["E"][0] == 0
    assert intervals["A"][1] > 1e20


def test_bootstrap_is_repeatable_and_seeded():
    points = published("stack")
    one, same, other = (fit(*points, bootstrap=50, seed=seed) for seed in (3, 3, 4))
    assert one.intervals == same.intervals
    np.testing.assert_array_equal(one.draws, same.draws)
    assert one.intervals != other.intervals
    assert one.draws.shape == (50, 4)


def test_bootstrap_surrounds_the_estimate_and_leaves_it_alone():
    points = published("pile")
    plain, law = fit(*points), fit(*points, bootstrap=200)
    assert plain.intervals is None
    assert plain.draws is None
    assert (plain.E, plain.k) == (law.E, law.k)
    for name in NAMES:
        low, high = law.intervals[name]
        assert low < getattr(law, name) < high


def test_an_end_that_nothing_settles_survives_a_file():
    """JSON has no infinity."""
    law = ParallelScalingLaw(0.7, 1e7, 0.2, 0.4, intervals={"A": (0.0, np.inf), "k": (-np.inf, 0.5)})
    written = json.dumps(law.to_dict(), allow_nan=False)
    assert ParallelScalingLaw.from_dict(json.loads(written)).intervals == law.intervals


def test_prediction_intervals_have_the_shape_of_predictions():
    law = fit(*published("stack"), bootstrap=50)
    low, high = law.predict_interval([1e9, 2e9, 4e9], [[1], [8]])
    assert low.shape == high.shape == (2, 3)
    assert (low < high).all()
    with pytest.raises(ValueError, match="no bootstrap draws to make an interval from; fit it with bootstrap=1000"):
        fit(*published("stack")).predict_interval(1e9, 1)


def test_corrected_percentiles_of_symmetric_draws_are_plain_ones():
    draws = np.linspace(-1, 1, 2001)[:, None]
    low, high = corrected_percentiles(draws, np.zeros(1), 0.9)
    assert (low[0], high[0]) == pytest.approx((-0.9, 0.9), abs=2e-3)
    low, high = corrected_percentiles(draws, np.full(1, 0.5), 0.9)  # most draws lie below the estimate: both ends rise
    assert low[0] > -0.5
    assert high[0] > 0.98


def test_the_interval_of_a_prediction_widens_with_few_runs():
    """By Student's t with the runs' degrees of freedom, in place of the normal distribution."""
    points = [np.concatenate([values[:3], values[-3:]]) for values in noisy(2e-3, 3)]
    law = fit(*points, bootstrap=400)
    assert law.freedom == 2
    as_of_many = dataclasses.replace(law, freedom=10**6)
    widths = [np.subtract(*each.predict_interval(1e9, 2)) for each in (law, as_of_many)]
    assert widths[0] < 1.3 * widths[1] < 0  # low less high
    assert fit(*points).freedom is None
