"""The study at the size of one GPU, which no test trains: its runs are told apart, and each has a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("evidence")
WORDS = [(str(number), f"the document of number {number}, one of several. " * 200) for number in range(50)]


@pytest.fixture(scope="module")
def runs(evidence: None) -> list[Any]:
    """All of the plan, of which none waits for the rows of another."""
    from plan import gpu_plan

    return list(gpu_plan({}))


def test_every_run_has_a_name_of_its_own(runs: list[Any]) -> None:
    """Rows and folders are found by it; two that are the same would be one model."""
    assert len({run.name for run in runs}) == len(set(runs)) == len(runs)


def test_finished_rows_change_nothing(runs: list[Any]) -> None:
    from plan import gpu_plan

    assert list(gpu_plan({runs[0].name: {}})) == runs


def test_a_run_that_fails_holds_up_no_other(
    runs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import work

    def do(run: Any, work: Path, results: Path) -> str:
        if run == runs[1]:
            raise ValueError("the loss is not a number")
        (results / "scratch" / f"{run.name}.json").write_text("{}")
        return "done"

    monkeypatch.setattr(work, "do", do)
    monkeypatch.setattr("sys.argv", ["work.py", "--gpu", "--work", f"{tmp_path}/work", "--results", str(tmp_path)])
    (tmp_path / "scratch").mkdir()
    with pytest.raises(SystemExit, match=f"These runs failed, for the reasons above: {runs[1].name}"):
        work.main()
    assert {path.stem for path in (tmp_path / "scratch").iterdir()} == {run.name for run in runs} - {runs[1].name}
    assert "the loss is not a number" in capsys.readouterr().err


def test_every_model_from_scratch_can_be_built(runs: list[Any]) -> None:
    """At their own width, of which the heads follow, with two layers in place of eight and on a few tokens."""
    from arms import Run, build

    chosen = [run for run in runs if isinstance(run, Run)]
    assert len(chosen) == 6
    sizes, ids = {}, torch.randint(1, 256, (2, 5))
    for run in chosen:
        model = build(replace(run, layers=2)).eval()
        with torch.no_grad():
            assert model(ids).shape == (2, 5, 256)
        sizes[run] = sum(parameter.numel() for parameter in model.parameters())
    dense, four, *_ = chosen
    twin = next(run for run in chosen if run.arm == "twin")
    assert sizes[twin] == pytest.approx(sizes[four], rel=0.001)
    assert sizes[dense] == min(sizes.values())


def test_every_recycled_model_can_be_built(runs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what each arm adds, and settings that say what of it trains."""
    import recycling

    monkeypatch.setattr(recycling, "_training", lambda tokens: WORDS)
    chosen = [run for run in runs if isinstance(run, recycling.RecycleRun)]
    assert len(chosen) == 10
    for run in chosen:
        folder = tmp_path / run.name
        folder.mkdir()
        arm, start = run.of_arm, recycling._start(run, folder)
        model, tokenizer = recycling.open_checkpoint(str(start))
        assert tokenizer is not None
        if arm.streams or arm.prefix:
            prefix = model.get_decoder().layers[0].self_attn.prefix_k
            assert prefix.shape[2] == recycling.PREFIX_LENGTH * (run.streams if arm.long else 1)
            assert len(prefix) == run.streams or arm.prefix
        else:
            assert start == recycling.small_model_path()
        if arm.trains == recycling.NOTHING:
            assert run.tokens == run.backbone_rate == run.streams_rate == 0
            continue
        settings = recycling._settings(run, folder)
        assert settings.tokens == run.tokens > 0
        rates = (settings.learning_rate or 0, settings.streams_learning_rate or 0)
        assert rates == (run.backbone_rate, run.streams_rate)
        assert max(rates) > 0
