"""Plots: that they show what they should, by what is drawn."""

import numpy as np
import pytest

from parscale.scaling_laws import cost, fit, frontier, plots, published, published_models

WORK = {"input_length": 64, "output_length": 64}


@pytest.fixture(scope="module")
def law():
    return fit(*published("stack"), bootstrap=20)


def test_measured_and_predicted_shows_every_run(law):
    left, right = plots.measured_and_predicted(law, published("stack")).axes
    assert sum(len(line.get_xdata()) for line in left.lines if line.get_marker() not in ("None", "")) == 24
    errors = np.concatenate([line.get_ydata() for line in right.lines[:4]])
    assert np.abs(errors).max() < 1  # per cent
    assert left.get_xscale() == "log"


def test_contours_mark_the_runs(law):
    axes = plots.contours(law, published("stack")).axes[0]
    assert len(axes.lines[0].get_xdata()) == 24
    assert axes.get_ylim() == pytest.approx((1, 16))
    plots.contours(law)


def test_isoloss_curves_have_one_loss_each(law):
    axes = plots.isoloss(law, [1e9, 2e9]).axes[0]
    for line in axes.lines:
        losses = law.predict(line.get_xdata(), line.get_ydata())
        assert np.ptp(losses) < 1e-9
    assert len(axes.collections) == 2  # a band for each


def test_cost_plots_show_every_cost(law):
    models = published_models()
    costs = {(p, b): cost(models["0.5B"], num_streams=p, batch_size=b, **WORK) for p in (1, 4) for b in (1, 2, 4)}
    left, _ = plots.cost_curves(costs).axes
    assert [line.get_label() for line in left.lines] == ["P = 1", "P = 4"]
    left, right = plots.cost_curves(
        {(p, kv, b): item for (p, b), item in costs.items() for kv in ("own", "shared")}
    ).axes
    assert [line.get_label() for line in left.lines] == ["P = 1, own", "P = 1, shared", "P = 4, own", "P = 4, shared"]
    assert [len(line.get_xdata()) for line in right.lines] == [3] * 4
    bars, _ = plots.cost_bars({f"P = {p}": costs[p, 1] for p in (1, 4)}).axes
    heights = sum(patch.get_height() for patch in bars.patches)
    assert heights == pytest.approx((costs[1, 1].memory_bytes + costs[4, 1].memory_bytes) / 2**30)
    front, _ = plots.pareto(law, models, (1, 2), batch_size=1, **WORK).axes
    assert [len(line.get_xdata()) for line in front.lines] == [6, 6]
    best, _ = plots.plan_curve(frontier(law, models["0.5B"], memory_bytes=2e9)).axes
    assert best.lines[0].get_ydata().min() == min(p.loss for p in frontier(law, models["0.5B"], memory_bytes=2e9))


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_figures_are_written_whole_or_not_at_all(law, tmp_path, ending):
    plots.save(plots.isoloss(law), tmp_path / f"a.{ending}")
    assert (tmp_path / f"a.{ending}").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"b.xyz must end in one of .png, .pdf, .svg"):
        plots.save(plots.isoloss(law), tmp_path / "b.xyz")
    with pytest.raises(ValueError, match=r"c must end in one of .png, .pdf, .svg"):
        plots.save(plots.isoloss(law), tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{ending}"]


def test_numbers_as_people_say_them():
    assert [plots.short(n) for n in (5e8, 1.57e9, 2e12, 1500, 12)] == ["500M", "1.57B", "2T", "1.5K", "12"]
