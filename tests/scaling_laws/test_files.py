"""Tables, configurations and laws from files: read rightly where they can be read in one way, else refused by line."""

import json
import math
import os
import re

import numpy as np
import pytest

from parscale.cli.application import run
from parscale.cli.law import read_law
from parscale.scaling_laws import cost, fit, published, published_models, read_hardware, read_points, read_shape
from parscale.scaling_laws.data import read_csv

POINTS = published("stack")
DEVICE = "name,label,memory_gb,bandwidth_gbs,tflops_16bit,tflops_32bit\nmine,Mine,8,100,10,5\n"
MARKS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16": b"",
    "utf-16-le": b"\xff\xfe",
    "utf-16-be": b"\xfe\xff",
    "utf-32": b"",
}


def table(delimiter=",", quote="", thousands="", end="\n"):
    """The published runs as a spreadsheet may write them."""

    def cell(text):
        return f"{quote}{text}{quote}"

    lines = [[cell(name) for name in ("name", "params", "streams", "loss")]]
    for n, p, loss in zip(*POINTS, strict=True):
        size = f"{n:,.0f}".replace(",", thousands)
        lines.append([cell("a"), cell(size), cell(f"{p:.0f}"), cell(f"{loss}")])
    return "".join(delimiter.join(line) + end for line in lines)


@pytest.mark.parametrize("encoding", MARKS)
@pytest.mark.parametrize(
    "text",
    [
        table(),
        table(";"),
        table("\t"),
        table(", ", '"'),
        table(quote='"', thousands=","),
        table(end="\r\n"),
        table(end="\r"),
        "# a note\n\n" + table(end="\n\n"),
    ],
)
def test_a_table_is_read_as_it_was_meant(tmp_path, text, encoding):
    path = tmp_path / "runs.csv"
    path.write_bytes(MARKS[encoding] + text.encode(encoding))
    assert [column.tolist() for column in read_points(path)] == [column.tolist() for column in POINTS]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("params,streams,loss\n1e6,1,2\n1,571,472,384,1,1.5", "line has 6 cells, but the header has 3 columns"),
        ("params,streams,loss\n1e6,1,1,0383", "the line has 4 cells, but the header has 3 columns; write numbers"),
        ("params,streams,loss\n1e6,1,2,", "line 2: the line has 4 cells"),
        ("params,streams,loss,note\n1e6,1,2", "line 2: note is 'empty': the line has 3 cells, but the header has 4"),
        ("params,streams,loss\n\n# x\n1e6,1", "line 4: loss is 'empty': the line has 2 cells, but the header has 3"),
        ("params,streams,loss\n1e6 1 2", "line 2: streams is 'empty': the line has 1 cells"),
        ("params,streams,loss,loss\n1e6,1,2,3", "line 1: the header names loss twice; remove one of the columns"),
        ("params,note,streams,loss,note\n1e6,a,1,2,b", "line 1: the header names note twice"),
        ("params;streams;loss\n1571472384;1;1,0383", "line 2: loss is '1,0383'; give a finite number with a decimal"),
        ('params,streams,loss\n"1,571",1,2', "line 2: params is '1,571'; give a finite number"),
        ('params,streams,loss\n"1,57,472",1,2', "line 2: params is '1,57,472'; give a finite number"),
        ("params,streams,loss\n1 571 472,1,2", "line 2: params is '1 571 472'; give a finite number"),
        ("params,streams,loss\n1e6,,2", "line 2: streams is 'empty'; give a finite number"),
        ("params,streams,loss\n1e6, ,2", "line 2: streams is 'empty'; give a finite number"),
        ('params,streams,loss\n"1e6,1,2', "line 2 cannot be read: unexpected end of data"),
        ("params streams loss\n1e6 1 2", "has no column params, streams, loss; it has params streams loss"),
        ("p\0arams,streams,loss\n1,1,1", "is not a text file; give a CSV file with the columns params, streams, loss"),
        (f"params,streams,loss\n{'9' * 200_000},1,1", "line 2 cannot be read: field larger than field limit"),
        ("", "is empty; it needs a header with the columns params, streams, loss"),
        ("N,P,loss\n1,1,1\n", "has no column params, streams; it has N, P, loss; name its columns params"),
        ("params,streams,loss\n1e6,1,2.0\n1e6,2,nan\n", "line 3: loss is 'nan'; give a finite number"),
        ("params,streams,loss\n1e6,one,2\n", "line 2: streams is 'one'"),
        ("params,streams,loss\n1e6,1,0\n", "losses of point 1 is 0; every one must be finite and above 0"),
        ("params,streams,loss\n1e6,1,2\n-5,1,2\n", "params of point 2 is -5; every one must be finite and above 0"),
        ("params,streams,loss\n1e6,0.5,2\n", "streams of point 1 is 0.5; P is a whole number of streams"),
        ("params,streams,loss\n1,1,2\n2,1,2\n1,1,2\n", "points 1 and 3 are the same in every digit (1, 1, 2)"),
    ],
)
def test_a_table_that_is_none_or_can_be_read_in_two_ways_is_refused(tmp_path, capsys, lines, said):
    path = tmp_path / "runs.csv"
    path.write_text(lines)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        read_points(path)
    assert "point" in said or str(path) in str(caught.value)  # points are counted, also where they are no file's
    assert run(["law", "fit", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert said in printed.err


def test_other_columns_may_hold_anything(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text('note,params,,streams,loss,\n"a, ""b""; c",1.5e6,x,1,2,\n')
    assert {name: column.tolist() for name, column in read_csv(path).items()} == {
        "params": [1.5e6],
        "streams": [1],
        "loss": [2],
    }


@pytest.mark.parametrize("encoding", MARKS)
def test_marks_are_no_part_of_configurations_laws_and_devices(tmp_path, encoding):
    def write(name, text):
        (tmp_path / name).write_bytes(MARKS[encoding] + text.encode(encoding))
        return tmp_path / name

    config = published_models()["0.5B"]
    assert read_shape(write("config.json", json.dumps(config))) == read_shape(config)
    law = fit(*POINTS)
    assert read_law(str(write("law.json", json.dumps(law.to_dict())))).to_dict() == law.to_dict()
    assert read_hardware(write("mine.csv", DEVICE))["mine"].memory_gb == 8


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("mine,Mine,8,100,10,5,0.5", "line 3: the line has 7 cells, but the header has 6 columns"),
        ("mine,Mine,8,100,10", "line 3: tflops_32bit is 'empty': the line has 5 cells"),
        ("mine,Mine,8,100,10,5", "mine appears twice; remove one of the rows"),
        ("other,Mine,8,inf,10,5", "bandwidth_gbs of 'other' is inf; it must be above 0 and finite"),
        ("other,Mine,8,nan,10,5", "bandwidth_gbs of 'other' is nan; it must be above 0 and finite"),
    ],
)
def test_a_table_of_devices_is_as_strict(tmp_path, row, said):
    path = tmp_path / "mine.csv"
    path.write_text(DEVICE + row)
    with pytest.raises(ValueError, match=re.escape(said)):
        read_hardware(path)


MODEL = published_models()["1.6B"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rms_norm_eps": math.nan}, "has rms_norm_eps = nan; it must be a finite number"),
        ({"attention_bias": math.nan}, "has attention_bias = nan; it must be a finite number"),
        ({"rope_scaling": {"factor": [1.0, math.inf]}}, "has factor = inf; it must be a finite number"),
        ({"time_step_limit": [-math.inf, 1.0]}, "has time_step_limit = -inf; it must be a finite number"),
        ({"num_hidden_layers": 10**9}, "has 1,000,000,000 layers; give one of at most 100,000"),
        ({"num_hidden_layers": [1, 10**9]}, "has 500,000,000 layers; give one of at most 100,000"),
        (
            {"hidden_size": 10**400},
            "has hidden_size = a number of 1329 bits; it must be a whole number",
        ),
        ({"head_dim": [64, 10**400]}, "has head_dim = [64, 1"),
        ({"vocab_size": True}, "has no vocab_size"),
        ({"layer_types": ["full_attention"] * 35}, "has 36 layers and 35 layer_types; it must name one for each"),
        ({"layer_types": ["full_attention"] * 10**6}, "has 36 layers and 1000000 layer_types"),
        (
            {"num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": 3},
            "mlp_only_layers is 3; it must be a list of layers",
        ),
        (
            {"num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": [[]]},
            "mlp_only_layers is [[]]; it must be a list of layers",
        ),
        ({"num_experts": 8}, "has no num_experts_per_tok or num_experts_per_token or moe_top_k"),
        ({"num_experts": 8, "num_experts_per_tok": 9}, "each token passes 9 experts of 8"),
    ],
)
def test_numbers_of_no_model_are_refused(tmp_path, capsys, change, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        read_shape(MODEL | change)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODEL | change))
    assert run(["cost", str(path), "--num-streams", "2", "--batch-size", "1"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert said in printed.err


def test_an_infinite_limit_of_time_steps_is_read():
    """As the state-space models of transformers write it."""
    assert read_shape(MODEL | {"time_step_limit": [0.0, math.inf]}) == read_shape(MODEL)


def test_many_dense_layers_are_counted_at_once():
    layers = 100_000
    config = MODEL | {"num_hidden_layers": layers, "num_experts": 8, "num_experts_per_tok": 2}
    config |= {"mlp_only_layers": list(range(0, layers, 2))}
    assert read_shape(config).sparse_layers == layers // 2


@pytest.mark.parametrize("name", ["num_streams", "batch_size", "input_length", "output_length"])
def test_work_without_end_is_refused(name):
    work = {"num_streams": 2, "batch_size": 1, "input_length": 8, "output_length": 8} | {name: 10**10}
    with pytest.raises(ValueError, match=f"{name} is above the maximum of [0-9,]*; give a smaller one"):
        cost(MODEL, **work)


LAW = fit(*POINTS).to_dict()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"E": math.nan}, "a law has numbers for E, A, alpha and k; E is nan"),
        ({"k": 10**400}, "a law has numbers for E, A, alpha and k; k is 1"),
        ({"E": -0.5}, "E of a law, a loss, is at least 0, got -0.5"),
        ({"A": -1}, "A and alpha of a law are above 0, got -1 and 0.189"),
        ({"alpha": 0}, "A and alpha of a law are above 0, got 1.1"),
        ({"r2": "good"}, "r2 of a law is a number or null, got 'good'"),
        ({"intervals": [1, 2]}, "the intervals of a law are given by its parameters' names, got [1, 2]"),
        ({"intervals": {"k": 1}}, "the interval of k in a law is two numbers, got 1"),
        ({"intervals": {"k": [0, "x"]}}, "the interval of k in a law is two numbers, got [0, 'x']"),
        ({"notes": 5}, "the notes of a law are a list of sentences, got 5"),
    ],
)
def test_a_law_that_is_none_is_refused(tmp_path, change, said):
    path = tmp_path / "law.json"
    path.write_text(json.dumps(LAW | change))
    with pytest.raises(ValueError, match=re.escape(f"{path}: {said}")):
        read_law(str(path))


@pytest.mark.parametrize("contents", [b"[" * 100_000, b"\xff\xff", b"{", b"9" * 5000, b"[]"])
def test_damaged_json_is_refused(tmp_path, contents):
    path = tmp_path / "a.json"
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=r"a\.json is not a law; give a file that"):
        read_law(str(path))
    with pytest.raises(ValueError, match=r"a\.json is not a (configuration|text file); give the path of"):
        read_shape(path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["law", "fit", "FILE.csv"],
        ["law", "predict", "FILE.csv", "--params", "1B", "--streams", "2"],
        ["law", "predict", "FILE.json", "--params", "1B", "--streams", "2"],
        ["cost", "FILE.json", "--num-streams", "2", "--batch-size", "1"],
        ["cost", "config.json", "--num-streams", "2", "--batch-size", "1", "--hardware-file", "FILE.csv"],
        ["cost", "config.json", "--num-streams", "2", "--batch-size", "1", "--law", "FILE.json"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize(("kind", "make"), [("a pipe", os.mkfifo), ("a device", None), ("a folder", os.mkdir)])
def test_what_is_no_file_is_named_and_never_opened(tmp_path, monkeypatch, capsys, arguments, kind, make):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    place = next(argument for argument in arguments if argument.startswith("FILE"))
    if make is None:
        os.symlink(os.devnull, place)
    else:
        make(place)
    assert run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    if arguments[:2] != ["cost", "FILE.json"] or kind != "a folder":  # of a checkpoint, which is empty
        assert f"{place} is {kind}" in printed.err


def test_numbers_are_as_python_reads_them(tmp_path):
    path = tmp_path / "runs.csv"
    cells = ["1_000", "1e3", "+1000", "1000.", '"1,000.0"', '"1,000,000"', '"-1,000.5"']
    path.write_text("params\n" + "\n".join(cells))
    expected = [1000, 1000, 1000, 1000, 1000, 1e6, -1000.5]
    np.testing.assert_array_equal(read_csv(path, ["params"])["params"], expected)
