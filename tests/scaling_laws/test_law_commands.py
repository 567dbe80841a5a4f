"""`parscale law` and `parscale cost`."""

import dataclasses
import json
import math

import numpy as np
import pytest

from parscale.checkpoints import small_model_path
from parscale.cli.application import run
from parscale.cli.output import print_figures
from parscale.scaling_laws import (
    ParallelScalingLaw,
    cost,
    fit,
    plots,
    published,
    published_models,
    read_points,
    read_shape,
    sweep,
)
from parscale.scaling_laws.corpus import Corpus


@pytest.fixture
def runs_csv(tmp_path):
    path = tmp_path / "runs.csv"
    rows = zip(*published("stack"), strict=True)
    path.write_text("params,streams,loss\n" + "".join(f"{n:.0f},{p:.0f},{loss}\n" for n, p, loss in rows))
    return path


@pytest.fixture
def config_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published_models()["1.6B"]))
    return path


def test_fit_prints_json_and_draws(runs_csv, tmp_path, capsys):
    arguments = ["law", "fit", str(runs_csv), "--json", "--bootstrap", "50", "--compare"]
    assert run([*arguments, "--plot", str(tmp_path / "fit.png")]) == 0
    printed = json.loads(capsys.readouterr().out)
    law = fit(*published("stack"), bootstrap=50)
    assert (printed["E"], printed["k"]) == pytest.approx((law.E, law.k))
    assert printed["intervals"]["k"] == pytest.approx(list(law.intervals["k"]))
    assert printed["points"] == 24
    assert printed["comparison"][0]["form"] == "log"
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")


def test_fit_prints_a_table(runs_csv, capsys):
    assert run(["law", "fit", str(runs_csv), "--bootstrap", "0", "--compare"]) == 0
    printed = capsys.readouterr().out
    assert "0.393457" in printed
    assert "streams error" in printed


def test_fit_of_another_form_and_with_tokens(runs_csv, tmp_path, capsys):
    assert run(["law", "fit", "pile", "--form", "rho", "--bootstrap", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rho"] == pytest.approx(0.899, abs=5e-4)
    path = tmp_path / "joint.csv"
    lines = ["params,streams,tokens,loss"]
    for n in (1e7, 3e7, 1e8):
        for d in (1e9, 4e9, 16e9):
            for p in (1, 2, 4):
                loss = 0.7 + (1e7 / (n * (0.4 * math.log(p) + 1))) ** 0.2 + (5e8 / d) ** 0.3
                lines.append(f"{n:.0f},{p},{d:.0f},{loss}")
    path.write_text("\n".join(lines))
    assert run(["law", "fit", str(path), "--form", "joint", "--bootstrap", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["beta"] == pytest.approx(0.3, rel=1e-2)


def test_predict_from_runs_from_a_fit_and_from_a_published_law(runs_csv, tmp_path, capsys):
    assert run(["law", "fit", str(runs_csv), "--json", "--bootstrap", "20"]) == 0
    fitted = tmp_path / "law.json"
    fitted.write_text(capsys.readouterr().out)
    law = fit(*published("stack"))
    for source in (str(runs_csv), str(fitted), "stack"):
        arguments = ["law", "predict", source, "--params", "1.6B", "3e9", "--streams", "1", "8", "--bootstrap", "20"]
        assert run([*arguments, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["predictions"]
        assert [(row["params"], row["streams"]) for row in rows] == [(1.6e9, 1), (1.6e9, 8), (3e9, 1), (3e9, 8)]
        assert rows[1]["loss"] == pytest.approx(law.predict(1.6e9, 8))
        assert rows[1]["equivalent_params"] == pytest.approx(law.equivalent_params(1.6e9, 8))
        assert ("low" in rows[1]) == (source != str(fitted))
        assert run(arguments) == 0
        assert "equivalent params" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["contours", "measured", "isoloss"])
def test_plot_draws(runs_csv, tmp_path, kind):
    output = tmp_path / "law.png"
    assert run(["law", "plot", str(runs_csv), str(output), "--kind", kind, "--bootstrap", "10"]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")


def test_cost_prints_json_and_draws(config_json, tmp_path, capsys):
    arguments = ["cost", str(config_json), "--num-streams", "1", "8", "--batch-size", "1", "8"]
    assert run([*arguments, "--json", "--plot", str(tmp_path / "cost.png")]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = cost(published_models()["1.6B"], num_streams=8, batch_size=8, input_length=256, output_length=256)
    row = printed["costs"][-1]
    assert (row["streams"], row["batch_size"]) == (8, 8)
    assert row["seconds"] == pytest.approx(expected.seconds)
    assert row["memory"] == pytest.approx(expected.memory)
    assert printed["crossovers"][0]["slower_from_batch_size"] == pytest.approx(11, abs=1)
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_no_figure_is_cut_off(config_json, monkeypatch, capsys):
    """However narrow the terminal is, or where there is none."""
    monkeypatch.setenv("COLUMNS", "40")
    assert (
        run(["cost", str(config_json), "--num-streams", "1", "8", "--batch-size", "64", "--kv", "own", "shared"]) == 0
    )
    print_figures({"checkpoint": "a long name of a folder " * 9})
    printed = capsys.readouterr().out
    assert "\u2026" not in printed
    assert "a long name of a folder " * 9 in printed


def test_cost_says_where_streams_lose(config_json, capsys):
    arguments = ["cost", str(config_json.parent), "--num-streams", "8", "--batch-size", "1", "--hardware", "h100"]
    assert run(arguments) == 0
    printed = capsys.readouterr().out
    assert "P = 8: slower from batch 15 on and larger from batch 18 on than the model of equal loss;" in printed
    assert "at batch 1, slower from 4537 prompt tokens on" in printed


@pytest.mark.parametrize(
    ("kv", "active", "said"),
    [
        ("own", 8, ": slower from batch 162 on (and at some small batches) and larger from batch 208 on than"),
        ("shared", 8, "at batch 1, slower at some short prompts only and never larger"),
        ("shared", 1, "(and at some small batches) and never larger than the model of equal loss; at batch 1, never"),
    ],
)
def test_cost_says_that_a_mixture_of_experts_is_slower_at_small_batches(kv, active, said, tmp_path, capsys):
    """P streams of few tokens load more experts than one; the table has a ratio above 1 beside the sentence."""
    sizes = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "vocab_size": 151936}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    experts = {"num_experts": 16 * active, "num_experts_per_tok": active, "moe_intermediate_size": 768}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "qwen3_moe", **sizes, **heads, **experts, "tie_word_embeddings": False}))
    arguments = ["cost", str(path), "--num-streams", "4", "--batch-size", "2", "64", "--hardware", "h100"]
    arguments += ["--kv", kv] * (kv == "shared")
    assert run([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    first, larger = (row["seconds_vs_dense"] for row in printed["costs"])
    assert first > 1 > larger
    assert printed["crossovers"][0]["slower_at_smaller_batch_size"] is True
    assert printed["crossovers"][0]["larger_at_smaller_batch_size"] is False
    assert run(arguments) == 0
    sentence = capsys.readouterr().out.splitlines()[-1]
    assert said in sentence


def test_cost_takes_devices_from_a_file_and_counts_as_the_paper(config_json, tmp_path, capsys):
    table = tmp_path / "mine.csv"
    table.write_text("name,label,memory_gb,bandwidth_gbs,tflops_16bit,tflops_32bit\nmine,Mine,1,100,10,5\n")
    arguments = ["cost", str(config_json), "--num-streams", "1", "--batch-size", "1", "--json"]
    assert run([*arguments, "--hardware", "mine", "--hardware-file", str(table)]) == 0
    assert json.loads(capsys.readouterr().out)["costs"][0]["fits"] is False
    lengths = ["--input-length", "64", "--output-length", "64"]
    assert run([*arguments, *lengths, "--method", "paper"]) == 0
    expected = cost(
        published_models()["1.6B"], num_streams=1, batch_size=1, input_length=64, output_length=64, method="paper"
    )
    assert json.loads(capsys.readouterr().out)["costs"][0]["seconds"] == pytest.approx(expected.seconds)


def test_cost_reads_a_checkpoint_of_streams_only(config_json, tmp_path, capsys):
    folder = tmp_path / "streams"
    folder.mkdir()
    (folder / "parscale_config.json").write_text(json.dumps({"base_model_name_or_path": str(config_json.parent)}))
    assert run(["cost", str(folder), "--num-streams", "2", "--batch-size", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["params"] == 1_571_472_384


def test_sweep_trains_and_fits(tmp_path, monkeypatch, capsys):
    text = np.frombuffer(b"def f(x):\n    return x + 1\n\n" * 100, dtype=np.uint8)
    settings = {"sequence_length": 16, "batch_size": 2, "prefix_length": 2}
    monkeypatch.setattr(sweep, "read_corpus", lambda source: Corpus(text, text[:200]))
    runs = sweep.plan([(16, 1), (32, 1), (48, 1)], (1, 2), 64, **settings)
    monkeypatch.setitem(sweep.PRESETS, "tiny", lambda source: runs)
    assert run(["law", "sweep", str(tmp_path / "s"), "--preset", "tiny", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["points"] == 6
    assert printed["k"] == pytest.approx(fit(*read_points(tmp_path / "s" / "runs.csv")).k)
    assert printed["profile"].keys() == {"E", "A", "alpha", "k"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["law", "fit", "none.csv"], "none.csv does not exist; give "),
        (["law", "fit", "bad.csv"], "bad.csv has no column loss; it has params, streams"),
        (["law", "fit", "one.csv"], "all points have P = 2, so what a stream is worth (k) could be anything"),
        (["law", "fit", "stack", "--form", "cubic"], "no form 'cubic'"),
        (["law", "fit", "stack", "--form", "joint"], "a joint form needs several numbers of tokens"),
        (["law", "fit", "stack", "--form", "rho", "--plot", "x.png"], "--plot draws the form log, not rho"),
        (["law", "fit", "stack", "--plot", "x"], "x must end in one of .png, .pdf, .svg"),
        (["law", "plot", "stack", "x.xyz"], "x.xyz must end in one of .png, .pdf, .svg"),
        (
            ["law", "predict", "stack", "--params", "big", "--streams", "1"],
            "'big' is not a size; give a number such as 1.6e9",
        ),
        (["law", "predict", "stack", "--params", "-1", "--streams", "1"], "params must be finite and above 0"),
        (["law", "predict", "stack", "--params", "1B", "--streams", "0"], "'--streams'"),
        (
            ["law", "predict", "config.json", "--params", "1B", "--streams", "1"],
            "a law has numbers for E, A, alpha and k",
        ),
        (["law", "plot", "stack", "x.png", "--kind", "pie"], "--kind is 'pie'; give contours, measured or isoloss"),
        (["law", "plot", "stack", "x.png", "--nothing"], "No such option: --nothing"),
        (["law", "sweep", "s", "--preset", "huge"], "--preset is 'huge'; give one of smoke, gpu"),
        (["law", "sweep", "s", "--workers", "2", "--ray"], "give either the number of workers, 2, or Ray"),
        (["law", "sing"], "No such command 'sing'"),
        (["cost", "none.json", "--num-streams", "1", "--batch-size", "1"], "There is no file none.json"),
        (["cost", "config.json", "--num-streams", "0", "--batch-size", "1"], "'--num-streams'"),
        (["cost", "config.json", "--num-streams", "1", "--batch-size", "1", "--hardware", "x"], "no hardware 'x'"),
        (["cost", "bad.csv", "--num-streams", "1", "--batch-size", "1"], "bad.csv is not a configuration"),
        (
            ["cost", "config.json", "--num-streams", "1", "--batch-size", "1", "--plot", "x.xyz"],
            "x.xyz must end in one of .png, .pdf, .svg",
        ),
        (["cost", "config.json", "--num-streams", "1"], "Missing option '--batch-size'"),
    ],
)
def test_bad_input_is_one_line(arguments, complaint, config_json, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.csv").write_text("params,streams\n1,1\n")
    (tmp_path / "one.csv").write_text("params,streams,loss\n1e8,2,2\n2e8,2,1.9\n4e8,2,1.8\n8e8,2,1.7\n")
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert complaint in printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.csv", "config.json", "one.csv"]


@pytest.mark.parametrize("kind", ["full", "streams only", "config.json"])
def test_cost_counts_the_streams_that_a_checkpoint_has(kind, tmp_path, capsys):
    """Its kind of keys and its prefixes' length, where nothing else is given."""
    folder = tmp_path / "streams"
    backbone = str(small_model_path())
    options = ["--kv", "shared", "--prefix-length", "16", "--init", "random"]
    options += ["--streams-only"] * (kind == "streams only")
    assert run(["convert", backbone, str(folder), "--num-streams", "4", *options]) == 0
    capsys.readouterr()
    place = folder / "config.json" if kind == "config.json" else folder
    work = {"batch_size": 2, "input_length": 2000}
    arguments = ["cost", str(place), "--num-streams", "4", "--batch-size", "2", "--input-length", "2000", "--json"]
    for given, kv in (([], "shared"), (["--kv", "own"], "own")):
        assert run([*arguments, *given]) == 0
        (row,) = json.loads(capsys.readouterr().out)["costs"]
        shape = dataclasses.replace(read_shape(backbone), prefix_length=16)
        expected = cost(shape, num_streams=4, output_length=256, kv=kv, **work)
        assert row["memory"] == pytest.approx(expected.memory)


@pytest.mark.parametrize("transform", ["prompt", "lora"])
@pytest.mark.parametrize("kind", ["full", "streams only"])
def test_cost_of_streams_without_prefixes_is_refused(transform, kind, tmp_path, capsys):
    folder = tmp_path / "streams"
    options = ["--transform", transform, "--init", "random"] + ["--streams-only"] * (kind == "streams only")
    assert run(["convert", str(small_model_path()), str(folder), "--num-streams", "2", *options]) == 0
    capsys.readouterr()
    assert run(["cost", str(folder), "--num-streams", "2", "--batch-size", "1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"have the transform '{transform}', and costs are counted for 'prefix' alone; give the backbone's" in said


def test_both_kinds_of_keys_are_drawn(config_json, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: (drawn.append(figure), path.touch()))
    arguments = ["cost", str(config_json), "--num-streams", "4", "--batch-size", "1", "8", "--kv", "own", "shared"]
    assert run([*arguments, "--plot", str(tmp_path / "cost.png")]) == 0
    memory, _ = drawn[0].axes
    own, shared = (line.get_ydata() for line in memory.lines)
    assert [line.get_label() for line in memory.lines] == ["P = 4, own", "P = 4, shared"]
    assert all(own > shared)


def test_runs_with_streams_at_one_size_are_compared(tmp_path, capsys):
    law = ParallelScalingLaw(E=0.7, A=1e7, alpha=0.2, k=0.4)
    rows = [(1e8, 1), (2e8, 1), (4e8, 1), (8e8, 1), (4e8, 2), (4e8, 4)]
    path = tmp_path / "runs.csv"
    path.write_text("params,streams,loss\n" + "".join(f"{n:.0f},{p},{law.predict(n, p)}\n" for n, p in rows))
    assert run(["law", "fit", str(path), "--bootstrap", "0", "--compare", "--json"]) == 0
    compared = {row["form"]: row for row in json.loads(capsys.readouterr().out)["comparison"]}
    assert compared["log"]["r2"] == pytest.approx(1)
    assert compared["log"]["size_error"] is compared["log"]["streams_error"] is None


@pytest.mark.parametrize("form", ["rho", "power", "dense"])
def test_a_law_of_another_form_is_not_predicted_from(form, runs_csv, tmp_path, capsys):
    assert run(["law", "fit", str(runs_csv), "--form", form, "--json", "--bootstrap", "0"]) == 0
    (tmp_path / "law.json").write_text(capsys.readouterr().out)
    assert run(["law", "predict", str(tmp_path / "law.json"), "--params", "1e9", "--streams", "2"]) == 2
    assert f"holds a law of the form {form}, and this takes the form log alone" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["contours", "isoloss", "measured"])
def test_runs_in_which_streams_lose_are_drawn(kind, tmp_path):
    """With k below 0 there are numbers of streams of which the law says nothing."""
    law = ParallelScalingLaw(E=0.3, A=2e5, alpha=0.3, k=-0.4)
    rows = [(n, p, law.predict(n, p)) for n in (1e5, 2e5, 4e5, 8e5) for p in (1, 2, 4)]
    path = tmp_path / "runs.csv"
    path.write_text("params,streams,loss\n" + "".join(f"{n:.0f},{p},{loss}\n" for n, p, loss in rows))
    assert run(["law", "plot", str(path), str(tmp_path / "law.png"), "--kind", kind, "--bootstrap", "20"]) == 0
    assert (tmp_path / "law.png").read_bytes().startswith(b"\x89PNG")
