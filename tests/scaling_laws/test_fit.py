"""The fit: the paper's digits, an optimum no worse than the released code's, exact derivatives, and what it refuses."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from parscale.scaling_laws import ParallelScalingLaw, fit, fit_form, published
from parscale.scaling_laws.forms import FORMS
from parscale.scaling_laws.solve import DELTA, Problem, _Batch

# arXiv 2505.10475, table of fitted parameters; R2 to its four digits
PAPER = {
    "stack": {"E": 0.6912, "A": 1.131e7, "alpha": 0.1894, "k": 0.3935, "r2": 0.9978},
    "pile": {"E": 1.2888, "A": 1.974e8, "alpha": 0.1963, "k": 0.3345, "r2": 0.9987},
}
# Summed Huber loss at the best of the 300 starts of the code released with the paper (scipy 1.17's L-BFGS-B)
RELEASED_OPTIMUM = {"stack": 3.676742091742106e-05, "pile": 1.8139351180548875e-05}
# The same for the theory's form with a constant rho
PAPER_RHO = {"stack": (0.892, 0.9959), "pile": (0.899, 0.9968)}


@pytest.mark.parametrize("corpus", PAPER)
def test_published_fit_has_the_papers_digits(corpus):
    law, paper = fit(*published(corpus)), PAPER[corpus]
    for name in ("E", "alpha", "k"):
        assert getattr(law, name) == pytest.approx(paper[name], rel=2e-3), name
    assert pytest.approx(paper["A"], rel=2e-2) == law.A
    assert round(law.r2, 4) == paper["r2"]


@pytest.mark.parametrize("corpus", PAPER)
def test_optimum_is_no_worse_than_the_released_one(corpus):
    assert fit(*published(corpus)).huber <= RELEASED_OPTIMUM[corpus]


def huber_of(law, points):
    """The objective, written down a second time."""
    predicted = law.E + (law.A / (points.params * (law.k * np.log(points.streams) + 1))) ** law.alpha
    error = np.abs(np.log(points.losses) - np.log(predicted))
    return np.where(error <= 1e-3, error**2 / 2, 1e-3 * (error - 5e-4)).sum()


@pytest.mark.parametrize("corpus", PAPER)
def test_reported_quality_is_that_of_the_reported_law(corpus):
    points = published(corpus)
    law = fit(*points)
    assert law.huber == pytest.approx(huber_of(law, points), rel=1e-9)
    errors = points.losses - law.predict(points.params, points.streams)
    assert law.r2 == pytest.approx(1 - errors.var() / points.losses.var() - errors.mean() ** 2 / points.losses.var())


@pytest.mark.parametrize("corpus", PAPER)
def test_a_general_optimiser_finds_nothing_better_nearby(corpus):
    points = published(corpus)
    law = fit(*points)
    found = np.array([law.E, law.A / 1e9, law.alpha, law.k])
    result = minimize(
        lambda scale: 1e5 * huber_of(ParallelScalingLaw(*(found * scale * [1, 1e9, 1, 1])), points),
        np.ones(4),
        method="Nelder-Mead",
        options={"xatol": 1e-10, "fatol": 1e-12, "maxiter": 4000, "maxfev": 4000},
    )
    assert result.fun >= 1e5 * law.huber * (1 - 1e-7)


@pytest.mark.parametrize("corpus", PAPER)
def test_rho_form_fits_as_published(corpus):
    rho, r2 = PAPER_RHO[corpus]
    result = fit_form("rho", *published(corpus))
    assert round(result.values["rho"], 3) == rho
    assert round(result.r2, 4) == r2


def test_rho_form_is_the_theorys():
    """`(A / (N * P**(1/alpha) * DIVERSITY))**alpha`, `DIVERSITY = ((P-1)*rho + 1)**(-1/alpha)`."""
    points = published("pile")
    result = fit_form("rho", *points)
    floor, scale, alpha, rho = (result.values[name] for name in ("E", "A", "alpha", "rho"))
    size, count = points.params, points.streams
    diversity = ((count - 1) * rho + 1) ** (-1 / alpha)
    expected = floor + (scale / (size * count ** (1 / alpha) * diversity)) ** alpha
    np.testing.assert_allclose(result.predict(size, count), expected, rtol=1e-10)


THETAS = {
    "log": [-0.3, 16.0, 0.2, 0.4],
    "rho": [-0.3, 16.0, 0.2, 0.7],
    "power": [-0.3, 16.0, 0.2, 0.3],
    "dense": [-0.3, 16.0, 0.2],
    "joint": [-0.3, 16.0, 0.2, 0.4, 20.0, 0.3],
    "joint-both": [-0.3, 16.0, 0.2, 0.4, 20.0, 0.3, 0.1],
}


@pytest.mark.parametrize("name", FORMS)
def test_derivatives_are_those_of_finite_differences(name):
    form = FORMS[name]
    generator = np.random.default_rng(0)
    sizes = np.exp(generator.uniform(17, 22, (12, 2)))
    streams = np.tile([1.0, 2.0, 8.0], 4)
    theta = np.array(THETAS[name])
    losses = form.predict(theta[None], sizes, streams)[0] * np.exp(generator.normal(0, 2 * DELTA, 12))
    batch = _Batch(Problem(form, sizes, streams, losses), np.log(losses)[None], np.ones((1, theta.size), dtype=bool))
    rows = np.zeros(1, dtype=np.int64)
    gradient, hessian, _ = batch.derivatives(theta[None], rows, exact=True)

    def objective(at):
        return batch.objective(at[None], rows)[0]

    def slope(at):
        return batch.derivatives(at[None], rows, exact=True)[0][0]

    # Steps small enough that no residual crosses the Huber loss's kink; central differences err by step squared.
    for column, direction in enumerate(np.eye(theta.size) * 1e-6):
        expected = (objective(theta + direction) - objective(theta - direction)) / 2e-6
        assert gradient[0, column] == pytest.approx(expected, rel=1e-4, abs=1e-9)
        expected_row = (slope(theta + direction) - slope(theta - direction)) / 2e-6
        np.testing.assert_allclose(hessian[0, column], expected_row, rtol=1e-4, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(
    floor=st.floats(0.3, 2),
    scale=st.floats(6, 8.5),
    alpha=st.floats(0.1, 0.5),
    k=st.floats(-0.2, 1.5),
)
def test_a_law_without_noise_is_recovered(floor, scale, alpha, k):
    """Also one whose streams hurt (k below 0)."""
    truth = ParallelScalingLaw(floor, 10**scale, alpha, k)
    points = published("stack")
    law = fit(points.params, points.streams, truth.predict(points.params, points.streams))
    np.testing.assert_allclose(
        law.predict(points.params, points.streams), truth.predict(points.params, points.streams), rtol=1e-7
    )
    assert law.k == pytest.approx(k, abs=1e-3)
    assert law.alpha == pytest.approx(alpha, rel=1e-2)


@settings(max_examples=10, deadline=None)
@given(factor=st.floats(1e-3, 1e3))
def test_the_unit_of_size_only_scales_a(factor):
    points = published("stack")
    law, other = fit(*points), fit(points.params * factor, points.streams, points.losses)
    assert pytest.approx(law.A * factor, rel=1e-4) == other.A
    assert other.huber == pytest.approx(law.huber, rel=1e-6)
    assert (other.E, other.alpha, other.k) == pytest.approx((law.E, law.alpha, law.k), rel=1e-4)


def test_order_and_shape_of_the_points_do_not_matter():
    points = published("stack")
    law = fit(*points)
    order = np.random.default_rng(1).permutation(24)
    other = fit(*(column[order] for column in points))
    grid = fit(*(column.reshape(4, 6).tolist() for column in points))
    assert (other.E, other.k) == pytest.approx((law.E, law.k), rel=1e-6)
    assert (grid.E, grid.k) == pytest.approx((law.E, law.k), rel=1e-9)


def test_one_bad_run_hardly_moves_a_huber_fit():
    points = published("pile")
    losses = points.losses.copy()
    losses[9] *= 1.05
    law, spoiled = fit(*points), fit(points.params, points.streams, losses)
    assert spoiled.k == pytest.approx(law.k, rel=0.05)


@pytest.mark.parametrize("name", ["joint", "joint-both"])
def test_joint_laws_are_recovered(name):
    form = FORMS[name]
    sizes, tokens, streams = (
        column.ravel() for column in np.meshgrid([1e7, 3e7, 1e8, 3e8], [1e9, 4e9, 16e9], [1.0, 2.0, 4.0])
    )
    truth = np.array(THETAS[name])
    losses = form.predict(truth[None], np.stack([sizes, tokens], axis=1), streams)[0]
    result = fit_form(name, sizes, streams, losses, tokens)
    assert result.huber < 1e-12
    np.testing.assert_allclose(
        result.predict([5e8], [8], [1e11]),
        form.predict(truth[None], np.array([[5e8, 1e11]]), np.array([8.0]))[0],
        rtol=1e-4,
    )
    assert result.values["k"] == pytest.approx(0.4, rel=1e-2)
    assert result.values["beta"] == pytest.approx(0.3, rel=1e-2)


def test_predict_and_equivalents_are_the_formula():
    law = ParallelScalingLaw(E=0.7, A=1e7, alpha=0.2, k=0.4)
    assert law.predict(1e9, 1) == pytest.approx(0.7 + 0.01**0.2)
    assert law.equivalent_params(1e9, np.e**2) == pytest.approx(1.8e9)
    assert law.predict(1e9, 8) == pytest.approx(law.predict(law.equivalent_params(1e9, 8), 1))
    assert law.params_for(law.predict(2e9, 4), 4) == pytest.approx(2e9)
    assert law.predict([1e9, 2e9], [[1], [8]]).shape == (2, 2)
    with pytest.raises(ValueError, match=r"no size reaches loss 0.6: this law's floor is E = 0.7"):
        law.params_for(0.6)


@pytest.mark.parametrize(
    ("params", "streams", "message"),
    [
        (0, 1, "params must be finite and above 0"),
        (1e9, 0.5, "streams must be at least 1"),
        (1e9, np.nan, "streams"),
        ("1B", 1, "params must be numbers; got '1B'"),
        (1e9, "four", "streams must be numbers; got 'four'"),
        ([1e9, 2e9], [1, 2, 4], r"params of the shape \(2,\) and streams of the shape \(3,\) do not broadcast"),
    ],
)
def test_predictions_refuse_impossible_models(params, streams, message):
    law = ParallelScalingLaw(E=0.7, A=1e7, alpha=0.2, k=0.4)
    for ask in (law.predict, law.equivalent_params):
        with pytest.raises(ValueError, match=message):
            ask(params, streams)


def test_a_law_by_which_streams_hurt_says_where_it_ends():
    """1 - 0.5*ln P is 0 at P = e^2."""
    law = ParallelScalingLaw(E=0.7, A=1e7, alpha=0.2, k=-0.5)
    assert law.equivalent_params(1e9, 4) == pytest.approx(1e9 * (1 - np.log(2)))
    for ask in (law.predict, law.equivalent_params):
        with pytest.raises(
            ValueError, match=r"k = -0.5, with which 8 streams make the effective size 0 .* ask for P below 7.39"
        ):
            ask(1e9, [1, 8])
    with pytest.raises(ValueError, match=r"ask for P below 7\.39"):
        law.params_for(0.8, 8)


def test_draws_by_which_streams_hurt_leave_an_interval():
    """Of two kinds of draws one ends before P = 16: the interval reaches up without bound, and holds no NaN."""
    draws = np.array([[0.7, 1e7, 0.2, 0.1], [0.7, 1e7, 0.2, -0.5]] * 10)
    low, high = ParallelScalingLaw(0.7, 1e7, 0.2, 0.0, draws=draws).predict_interval(1e9, 16)
    assert low == pytest.approx(0.7 + (0.01 / (1 + 0.1 * np.log(16))) ** 0.2)
    assert high > 1e10


@settings(max_examples=20, deadline=None)
@given(
    streams=st.sets(st.integers(1, 64), min_size=2, max_size=5),
    alpha=st.floats(0.05, 1.5),
    k=st.floats(-0.2, 5),
)
def test_any_streams_up_to_64_recover_the_law(streams, alpha, k):
    """Whole numbers in lists, as people give them."""
    truth = ParallelScalingLaw(0.7, 1e7, alpha, k)
    grid = [(n, p) for p in sorted(streams) for n in (10**7, 4 * 10**7, 2 * 10**8, 10**9)]
    params, counts = [n for n, _ in grid], [p for _, p in grid]
    law = fit(params, counts, truth.predict(params, counts).tolist())
    np.testing.assert_allclose(law.predict(params, counts), truth.predict(params, counts), rtol=1e-7)
    assert law.k == pytest.approx(k, abs=1e-3)


def test_a_law_survives_its_dictionary():
    law = fit(*published("stack"), bootstrap=20)
    assert ParallelScalingLaw.from_dict(law.to_dict()) == law
    with pytest.raises(ValueError, match="k is None"):
        ParallelScalingLaw.from_dict({"E": 1, "A": 1, "alpha": 1})


# What cannot be fitted is said, not guessed.


def runs(params, streams):
    grid = [(n, p) for p in streams for n in params]
    truth = ParallelScalingLaw(0.7, 1e7, 0.2, 0.4)
    return [n for n, _ in grid], [p for _, p in grid], [truth.predict(n, p) for n, p in grid]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (([1e8, 2e8, 4e8], [1, 2, 1], [3.0, 2.0, 1.5]), "3 points for 4 parameters.*at least 4 runs are needed"),
        (runs([1e8, 2e8, 4e8, 8e8], [4]), r"all points have P = 4, so what a stream is worth \(k\) could be anything"),
        (runs([1e8], [1, 2, 4, 8]), r"no P has runs at two sizes, so how fast .* \(alpha\) could be anything"),
        (([1e8, 2e8, 4e8, 8e8], [1, 1, 2, 2], [2.5] * 4), "every run has loss 2.5, so there is nothing to explain"),
        (([1e8, 1.01e8, 1.02e8, 1.03e8], [1, 2, 3, 4], [2.0, 1.9, 1.8, 1.7]), r"no P has runs at two sizes"),
        (([1e8, 2e8, 1e8, 1e8], [1, 1, 2, 1], [3.0, 2.0, 1.5, 3.0]), "points 1 and 4 are the same in every digit"),
        (([1e8, 2e8, 4e8, 8e8], [1, 1, 2, 2], [3.0, 2.0, 1.5, -1.0]), "losses of point 4 is -1"),
    ],
)
def test_runs_that_settle_nothing_are_refused(points, message):
    with pytest.raises(ValueError, match=message):
        fit(*points)


def test_other_forms_refuse_what_they_lack():
    params, streams, losses = runs([1e8, 2e8, 4e8], [1, 2])
    with pytest.raises(ValueError, match="no form 'cubic'; give one of log, rho, power, dense"):
        fit_form("cubic", params, streams, losses)
    with pytest.raises(ValueError, match="the form 'joint' has a term in training tokens; give tokens"):
        fit_form("joint", params, streams, losses)
    with pytest.raises(ValueError, match=r"every run was trained on 1e\+09 tokens.*\(beta\) could be anything"):
        fit_form("joint", params, streams, losses, [1e9] * 6)
    with pytest.raises(ValueError, match="bootstrap is the number of resampled datasets, 0 for none; got -1"):
        fit(params, streams, losses, bootstrap=-1)
    with pytest.raises(ValueError, match=r"bootstrap is the number of resampled datasets, 0 for none; got 2\.5"):
        fit(params, streams, losses, bootstrap=2.5)
    for seed in (-1, 0.5, "x", None):
        with pytest.raises(ValueError, match=f"seed is {seed!r}; it must be a whole number of at least 0"):
            fit(params, streams, losses, bootstrap=5, seed=seed)
    for level in (0.0, 1.0, 90, float("nan")):
        with pytest.raises(ValueError, match=f"level is {level!r}; it must be between 0 and 1"):
            fit(*published("stack"), bootstrap=5).predict_interval(1e9, 2, level)
    with pytest.raises(ValueError, match="4 points for 4 parameters leave no way to estimate the noise"):
        fit(*runs([1e8, 4e8], [1, 2]), bootstrap=10)


def test_one_number_of_streams_is_enough_without_k():
    params, streams, losses = runs([1e8, 2e8, 4e8, 8e8], [1])
    assert fit_form("dense", params, streams, losses).values["alpha"] == pytest.approx(0.2, rel=1e-2)


def test_two_sizes_are_noted():
    law = fit(*runs([1e8, 4e8], [1, 2, 4, 8]))
    assert any("2 sizes cannot determine E, A and alpha alone" in note for note in law.notes)
    assert fit(*published("stack")).notes == ()


@pytest.mark.parametrize(
    ("k", "note"),
    [
        (0.0, "interval of k holds 0: these runs do not show that streams help"),
        (-0.2, "interval of k lies below 0: in these runs the streams did worse than as many parameters"),
    ],
)
def test_streams_that_do_not_help_are_noted(k, note):
    points = published("stack")
    truth = ParallelScalingLaw(0.7, 1e7, 0.2, k)
    noise = np.exp(np.random.default_rng(0).normal(0, 2e-3, 24))
    law = fit(points.params, points.streams, truth.predict(points.params, points.streams) * noise, bootstrap=100)
    assert len(law.notes) == 1
    assert note in law.notes[0]


def test_no_floor_is_noted():
    points = published("stack")
    losses = (1e8 / points.params / (0.3 * np.log(points.streams) + 1)) ** 0.2
    law = fit(points.params, points.streams, losses)
    assert any("E came out as 0" in note for note in law.notes)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.1, 1.0, 5.0]))
def test_runs_that_follow_no_law_neither_crash_nor_warn(seed, spread):
    """Losses without any order: there is an answer with finite parameters, and its intervals hold it."""
    generator = np.random.default_rng(seed)
    params, streams = 10 ** generator.uniform(5, 10, 10), generator.choice([1, 2, 4, 8], 10)
    params[:2], streams[:3] = [1e6, 3e6], [1, 1, 2]
    losses = np.exp(generator.normal(0, spread, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit_form("log", params, streams, losses, bootstrap=5)
        intervals = result.profile_intervals()
    assert np.isfinite(list(result.values.values())).all()
    for name, (low, high) in intervals.items():
        assert low <= result.values[name] * (1 + np.sign(result.values[name]) * 1e-6) + 1e-9
        assert high >= result.values[name] * (1 - np.sign(result.values[name]) * 1e-6) - 1e-9


def test_runs_beyond_the_law_are_noted():
    points = published("stack")
    hurt = np.where(points.streams == 8, 10.0, points.losses)
    assert any("k came out at its lower limit" in note for note in fit(points.params, points.streams, hurt).notes)
    rising = fit(points.params, points.streams, 2 * (points.params / 1e9) ** 0.05)
    assert any("these runs show no power law in size" in note for note in rising.notes)
