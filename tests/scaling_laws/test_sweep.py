"""The sweep: what it plans, that it resumes, and that its rows can be fitted. Models here train for a few steps."""

import dataclasses
import multiprocessing
import subprocess
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from small_models import small_llama
from torch.nn.functional import cross_entropy

from parscale import wrap
from parscale.scaling_laws import corpus as corpora
from parscale.scaling_laws import read_points, sweep
from parscale.scaling_laws.corpus import Corpus, read_corpus
from parscale.scaling_laws.sweep import PRESETS, RUNS, Run, plan, read_rows

ROOT = Path(__file__).parents[2]


def tiny_plan(**change):
    settings = {"sequence_length": 16, "batch_size": 2, "prefix_length": 2} | change
    return plan([(16, 1), (32, 1), (48, 1)], (1, 2), 64, **settings)


@pytest.fixture
def small_corpus(monkeypatch):
    text = np.frombuffer(b"def f(x):\n    return x + 1\n\n" * 100, dtype=np.uint8)
    monkeypatch.setattr(sweep, "read_corpus", lambda source: Corpus(text, text[:200]))
    return Corpus(text, text[:200])


def test_a_sweep_leaves_rows_that_can_be_fitted_and_resumes(small_corpus, tmp_path):
    runs = tiny_plan()
    trained = []

    def counting_wrap(model, streams, **settings):
        trained.append((model.config.hidden_size, streams))
        assert settings == {"prefix_length": 2, "init": "random", "seed": 0}
        return wrap(model, streams, **settings)

    shares = []
    rows = sweep.sweep(runs[:4], tmp_path / "s", counting_wrap, report=lambda run, share: shares.append(share))
    assert [row.run() for row in rows] == runs[:4]
    assert shares == [0.0] * 4 + [0.5, 1.0] * 4
    rows = sweep.sweep(runs, tmp_path / "s", counting_wrap)
    assert trained == [(run.hidden, run.streams) for run in runs]  # none twice
    assert read_rows(tmp_path / "s" / RUNS) == rows
    points = read_points(tmp_path / "s" / RUNS)
    assert points.losses.tolist() == [row.loss for row in rows]
    assert {path.name for path in (tmp_path / "s").iterdir()} == {RUNS}


def test_parameters_are_counted_without_the_embedding_and_with_the_streams(small_corpus):
    """H = 32, one layer, 2 heads and 1 key/value head of 16, MLP 88, T = 2; biases on queries, keys and values."""
    runs = plan([(32, 1)], (1, 2), 64, sequence_length=16, prefix_length=2)
    plain, streams = (sweep.train(run, small_corpus, wrap) for run in runs)
    layer = 32 * 32 + 32 + 2 * (32 * 16 + 16) + 32 * 32 + 3 * 32 * 88 + 2 * 32
    assert plain.params == layer + 32
    assert streams.params == plain.params + (2 * 32 * 32 + 32 + 32 * 2 + 2) + 2 * 2 * 2 * 16
    assert plain.seconds > 0
    assert plain.device == "cpu"


def test_training_is_repeatable_and_learns(small_corpus):
    run = Run(32, 1, 2, 12_800, sequence_length=32, batch_size=4, prefix_length=2)
    longer = Corpus(np.tile(small_corpus.train, 8), small_corpus.held_out)
    first, again = sweep.train(run, longer, wrap), sweep.train(run, longer, wrap)
    other = sweep.train(dataclasses.replace(run, seed=1), longer, wrap)
    assert first.loss == again.loss != other.loss
    assert first.loss < 0.5 * np.log(256)


def test_the_rate_rises_and_falls_along_a_cosine(small_corpus, monkeypatch):
    """Of models wider than 64 it is lower: here half of 1e-2, and half of that in the first step of two and halfway."""
    rates, take_step = [], torch.optim.AdamW.step

    def noting_step(self, *args, **options):
        rates.append(self.param_groups[0]["lr"])
        return take_step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting_step)
    sweep.train(Run(128, 1, 1, 40 * 2 * 16, 0, 16, 2, learning_rate=1e-2), small_corpus, wrap)
    assert len(rates) == 40
    assert (rates[0], rates[20]) == pytest.approx((0.0025, 0.0025))
    assert max(rates) == rates[1] == pytest.approx(5e-3, rel=0.01)
    assert rates[-1] < 1e-4


def test_the_held_out_loss_is_that_of_all_its_blocks(small_corpus):
    """Also where the last batch is smaller."""
    run = Run(16, 1, 1, 64, 0, 16, batch_size=1)
    model = small_llama(vocab_size=256, initializer_range=0.5)
    text = np.random.default_rng(0).integers(256, size=3 * 16 + 5, dtype=np.uint8)
    ids = torch.from_numpy(text[: 3 * 16].astype(np.int64)).view(3, 16)
    with torch.no_grad():
        expected = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    found = sweep.evaluate(model, Corpus(small_corpus.train, text), run, "cpu")
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.nightly  # by day workers run in the test that kills them
def test_workers_do_the_same_runs(small_corpus, tmp_path):
    runs = tiny_plan()[:3]
    alone = sweep.sweep(runs, tmp_path / "a", wrap)
    together = sweep.sweep(runs, tmp_path / "b", wrap, workers=2)
    assert [row.loss for row in together] == pytest.approx([row.loss for row in alone], rel=1e-4)


def test_an_interrupted_sweep_keeps_what_is_finished(small_corpus, tmp_path):
    def wrap_twice(model, streams, **settings):
        if (tmp_path / RUNS).exists() and len(read_rows(tmp_path / RUNS)) == 2:
            raise KeyboardInterrupt
        return wrap(model, streams, **settings)

    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(tiny_plan(), tmp_path, wrap_twice)
    assert len(read_rows(tmp_path / RUNS)) == 2
    assert [path.name for path in tmp_path.iterdir()] == [RUNS]


@pytest.fixture(scope="module")
def cluster():
    """Ray on two cores of this machine."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    yield
    ray.shutdown()


@pytest.mark.nightly  # Ray's agents have fifteen seconds to start, which a busy machine may not give them
def test_ray_goes_on_with_the_same_rows(small_corpus, tmp_path, cluster):
    runs = tiny_plan()
    alone = sweep.sweep(runs, tmp_path / "a", wrap)
    begun = sweep.sweep(runs[:2], tmp_path / "b", wrap)
    shares = []
    rows = sweep.sweep(runs, tmp_path / "b", wrap, on_ray=True, report=lambda run, share: shares.append(share))
    assert rows[:2] == begun
    assert [dataclasses.replace(row, seconds=0) for row in rows] == [
        dataclasses.replace(row, seconds=0) for row in alone
    ]
    assert shares == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0] + [1.0] * 4
    assert {row.run(): row for row in read_rows(tmp_path / "b" / RUNS)} == {row.run(): row for row in rows}


@pytest.mark.nightly
def test_what_goes_wrong_on_ray_is_said_as_elsewhere(small_corpus, tmp_path, cluster, monkeypatch):
    bad = Run(16, 1, 1, 512, 0, 16, 2, learning_rate=1e30)
    with pytest.raises(ValueError, match=r"^Run\(hidden=16.* did not train: its loss is nan; give it") as raised:
        sweep.sweep([bad], tmp_path, wrap, on_ray=True)
    assert type(raised.value) is ValueError
    get, rows = ray.get, []

    def get_two(reference):
        if len(rows) == 2:
            raise ray.exceptions.WorkerCrashedError
        rows.append(get(reference))
        return rows[-1]

    monkeypatch.setattr(ray, "get", get_two)
    with pytest.raises(ChildProcessError, match=r"Ray lost a run of the sweep \(WorkerCrashedError\); finished runs"):
        sweep.sweep(tiny_plan(), tmp_path, wrap, on_ray=True)
    assert read_rows(tmp_path / RUNS) == rows


@pytest.mark.slow
@pytest.mark.nightly  # by day a pool that breaks at once, below
def test_killed_workers_are_said_and_finished_runs_are_kept(small_corpus, tmp_path):
    def kill(run, share):
        for worker in multiprocessing.active_children():
            worker.kill()

    with pytest.raises(ChildProcessError, match=r"a process of the sweep was killed.*finished runs are kept: start"):
        sweep.sweep(tiny_plan(), tmp_path, wrap, workers=2, report=kill)
    kept = {row.run() for row in read_rows(tmp_path / RUNS)}
    assert 0 < len(kept) < 6
    assert [row.run() for row in sweep.sweep(tiny_plan(), tmp_path, wrap)] == tiny_plan()


def test_a_broken_pool_is_one_line(small_corpus, tmp_path, monkeypatch):
    class Broken(ProcessPoolExecutor):
        """Whose first process has ended before it did anything."""

        def submit(self, *args):
            future = Future()
            future.set_exception(BrokenProcessPool("A process in the process pool was terminated abruptly"))
            return future

    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Broken)
    with pytest.raises(ChildProcessError, match="with fewer workers, to continue it"):
        sweep.sweep(tiny_plan()[:2], tmp_path, wrap, workers=2)


def test_byte_order_marks_are_no_text(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_bytes(b"\xef\xbb\xbfx = 1\n")
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(corpora.python_files("stdlib")) == [("stdlib/a.py", b"x = 1\n")]


def test_half_a_character_in_a_data_set_is_named(monkeypatch):
    rows = [{"text": "whole"}, {"text": "cut \ud83d"}]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: rows)
    with pytest.raises(ValueError, match=r"the dataset 'some' holds half a character, '.ud83d', in row 2; correct it"):
        read_corpus("some")


def test_impossible_sweeps_are_refused_by_name(small_corpus, tmp_path):
    with pytest.raises(ValueError, match="one sweep reads one text; these runs name packages, stdlib"):
        sweep.sweep([Run(16, 1, 1, 64), Run(16, 1, 1, 64, source="packages")], tmp_path, wrap)
    with pytest.raises(
        ValueError, match="the text has 2,800 bytes to train on, but a run needs 9,999: give a larger source"
    ):
        sweep.sweep([Run(16, 1, 1, 9999)], tmp_path, wrap)
    (tmp_path / RUNS).write_text("params,streams,loss\n1,2,3\n")
    with pytest.raises(ValueError, match=r"runs.csv, line 2 is not a row of a sweep; delete the line"):
        sweep.sweep(tiny_plan(), tmp_path, wrap)
    with pytest.raises(ValueError, match="the held-out text has 200 bytes, fewer than a sequence of 256"):
        sweep.train(Run(16, 1, 1, 256), small_corpus, wrap)
    with pytest.raises(ValueError, match="did not train: its loss is nan; give it a lower learning rate"):
        sweep.train(Run(16, 1, 1, 512, 0, 16, 2, learning_rate=1e30), small_corpus, wrap)


def test_ray_has_to_be_there_and_decides_alone(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"how many runs go at a time: give either the number of workers, 2, or Ray"):
        sweep.sweep(tiny_plan(), tmp_path, wrap, workers=2, on_ray=True)
    monkeypatch.setattr(sweep, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"need the package ray: pip install 'parscale\[ray\]'"):
        sweep.sweep(tiny_plan(), tmp_path, wrap, on_ray=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_fitted(name):
    """Three sizes and three P at least, and runs that the default text is long enough for or that say otherwise."""
    runs = PRESETS[name]("stdlib")
    assert len({run.hidden for run in runs}) >= 3
    assert len({run.streams for run in runs}) >= 3
    assert len(set(runs)) == len(runs)
    work = [run.layers * run.hidden**2 * run.streams for run in runs]
    assert work == sorted(work)


def test_the_committed_rows_are_those_of_the_preset():
    """Each run once, none left out, and parameters as a model of that shape has them."""
    rows = read_rows(ROOT / "scaling_laws" / "data" / "sweep_smoke.csv")
    assert [row.run() for row in rows] == PRESETS["smoke"]("stdlib")
    for row in rows:
        plain = next(one.params for one in rows if one.hidden == row.hidden and one.streams == 1)
        hidden, p = row.hidden, row.streams
        added = p * hidden**2 + hidden + hidden * p + p + row.layers * 2 * p * row.prefix_length * 16
        assert row.params == plain + (added if p > 1 else 0)


def test_the_standard_library_is_read_once_and_split():
    text = read_corpus("stdlib")
    assert 5_000_000 < text.train.size + text.held_out.size < 20_000_000
    assert 0.01 < text.held_out.size / text.train.size < 0.15
    again = read_corpus("stdlib")
    assert (again.train == text.train).all()


def test_equal_documents_count_once_and_some_are_held_out(monkeypatch):
    documents = [(f"a/{index}.py", b"x = %d\n" % (index % 50)) for index in range(200)]
    monkeypatch.setattr(corpora, "python_files", lambda source: iter(documents))
    text = read_corpus("packages")
    whole = text.train.tobytes() + text.held_out.tobytes()
    assert whole.count(b"\0") == 50
    assert all(whole.count(b"x = %d\n" % index) == 1 for index in range(50))


def test_installed_packages_are_more_than_the_standard_library():
    labels = (name.split("/")[0] for name, _ in corpora.python_files("packages"))
    assert next(labels) == "stdlib"
    assert next(label for label in labels if label != "stdlib") == "site-packages"


def test_unreadable_data_sets_are_refused_by_name():
    with pytest.raises(ValueError, match=r"no text source './none': give stdlib, packages or the name of a dataset"):
        read_corpus("./none")


def test_a_local_data_set_is_read(tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(f"line {index}" for index in range(200)))
    text = read_corpus(str(tmp_path))
    assert b"line 7" in text.train.tobytes() + text.held_out.tobytes()


def test_a_local_data_set_is_no_pattern(tmp_path):
    for name, line in (("d1", "beside"), ("d[1]", "inside")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.txt").write_text("\n".join(f"{line} {index}" for index in range(200)))
    with pytest.raises(ValueError, match=r"d\[1\] contains one of the characters \*, \? and \[, which are wildcards"):
        read_corpus(str(tmp_path / "d[1]"))


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "scaling_law.py")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "slower from batch 11 on" in result.stdout


def test_the_page_names_a_text_of_the_size_that_the_preset_reads():
    longest = max(run.tokens for run in PRESETS["gpu"]("any"))
    assert read_corpus("stdlib").train.size < longest
    commands = [
        line for line in (ROOT / "docs/how/law.md").read_text(encoding="utf-8").splitlines() if "--preset gpu" in line
    ]
    assert len(commands) == 2
    assert all("--source packages" in command for command in commands)
