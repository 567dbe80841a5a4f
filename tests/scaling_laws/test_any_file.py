"""Whatever a table, a configuration or a law holds, it is read rightly or refused in one line, at once."""

import json
import math
import os
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from parscale.cli.law import read_law
from parscale.scaling_laws import cost, fit, published, published_models, read_hardware, read_points, read_shape
from parscale.scaling_laws.sweep import read_rows

ANYTHING = settings(
    max_examples=150, deadline=timedelta(seconds=5), suppress_health_check=list(HealthCheck), derandomize=True
)
HEADER = "params,streams,loss,note"
LINES = [[f"{n:.0f}", f"{p:.0f}", f"{loss}", "a"] for n, p, loss in zip(*published("stack"), strict=True)][:4]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


def outcome(read, folder, name, contents):
    """What is read, or None when it is refused."""
    path = folder / name
    path.write_bytes(contents)
    found, said = None, "read"
    try:
        found = read(path)
    except ValueError as error:
        said = str(error)
    left, now = os.listdir(folder), path.read_bytes()
    path.unlink()
    assert said
    assert "\n" not in said
    assert left == [name]
    assert now == contents
    return found


CELL = st.one_of(
    st.sampled_from(["", " ", "1,571,472,384", '"1,571,472,384"', "1,0383", '"1,0383"', "1.0383", "1e6", "2", "1 000"]),
    st.sampled_from(["nan", "inf", "-1", "0", '"', 'a"b', "1;2", "\t", "1_000", "0x10", "1e999", "9" * 400]),
    st.text("0123456789.,;-e\"\t' ", max_size=12),
)


@ANYTHING
@given(st.sampled_from(",;\t"), st.integers(0, 3), st.integers(0, 3), st.one_of(st.none(), CELL))
def test_a_changed_cell_is_read_rightly_or_refused(scratch, delimiter, row, column, cell):
    """Where something is read, every other number is what it was, and the cell is what Python makes of it."""
    lines = [list(line) for line in LINES]
    if cell is None:
        del lines[row][column]
    else:
        lines[row][column] = cell
    text = "\n".join(delimiter.join(line) for line in [HEADER.split(","), *lines])
    points = outcome(read_points, scratch, "runs.csv", text.encode())
    if points is None:
        return
    found = np.stack(points, axis=1)
    if column < 3:
        written = cell.strip().strip('"')
        assert found[row, column] == float(written.replace(",", "") if written.count(",") > 1 else written)
        found[row, column] = float(LINES[row][column])
    assert found.tolist() == [[float(number) for number in line[:3]] for line in LINES]


@ANYTHING
@given(st.one_of(st.binary(max_size=80), st.text(max_size=40).map(lambda text: f"{HEADER}\n{text}".encode())))
def test_any_table(scratch, contents):
    for read in (read_points, read_hardware, read_rows):
        outcome(read, scratch, "table.csv", contents)
    outcome(lambda path: read_law(str(path)), scratch, "law.json", contents)
    outcome(read_shape, scratch, "config.json", contents)


MODEL = published_models()["1.6B"] | {
    "head_dim": 96,
    "sliding_window": 512,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "mlp_only_layers": [0],
    "layer_types": ["full_attention"] * 36,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "attention_bias": True,
    "rms_norm_eps": 1e-6,
    "text_config": None,
    "depths": [1, 2],
}
ELSEWHERE = (
    "first_k_dense_replace", "decoder_sparse_step", "v_head_dim", "per_layer_config", "mlp_layer_types", "swa_head_dim",
    "num_attention_heads_per_layer", "num_kv_shared_layers", "global_head_dim", "zero_expert_num",
)  # fmt: skip
NUMBER = st.one_of(
    st.integers(-1, 100), st.sampled_from([10**5, 10**9, 10**15, 10**400]), st.floats(), st.none(), st.booleans()
)
VALUE = st.one_of(
    NUMBER, st.lists(NUMBER, max_size=3), st.text(max_size=3), st.dictionaries(st.text(max_size=2), NUMBER)
)


@ANYTHING
@given(st.dictionaries(st.sampled_from([*MODEL, *ELSEWHERE]), VALUE))
@example({"per_layer_config": {"9" * 5000: {}}})
@example({"per_layer_config": {"1": {"head_dim": [10**400]}}})
@example({"num_hidden_layers": 10**9})
@example({"num_hidden_layers": [1, 10**9]})
@example({"hidden_size": 10**400})
@example({"rms_norm_eps": math.nan})
@example({"num_experts_per_tok": 9})
def test_any_configuration(scratch, change):
    contents = json.dumps(MODEL | change).encode()
    shape = outcome(read_shape, scratch, "config.json", contents)
    if shape is not None:
        for method in ("roofline", "paper"):
            work = {"input_length": 64, "output_length": 64, "method": method}
            figures = outcome(
                lambda path, work=work: cost(path, num_streams=3, batch_size=2, **work),
                scratch,
                "config.json",
                contents,
            )
            assert figures is None or (0 < figures.seconds < math.inf and 0 < figures.memory_bytes < math.inf)


@ANYTHING
@given(
    st.sampled_from(["num_streams", "batch_size", "input_length", "output_length"]),
    st.one_of(st.integers(1, 10**6), st.sampled_from([10**9, 10**12, 10**30, 10**400])),
)
def test_any_amount_of_work(name, amount):
    work = {"num_streams": 2, "batch_size": 1, "input_length": 8, "output_length": 8} | {name: amount}
    if amount > (2**20 if name == "output_length" else 10**9):
        with pytest.raises(ValueError, match=f"{name} is above"):
            cost(published_models()["0.5B"], **work)
    else:
        assert 0 < cost(published_models()["0.5B"], **work).seconds < math.inf


LAW = fit(*published("stack")).to_dict()


@ANYTHING
@given(st.dictionaries(st.sampled_from([*LAW]), VALUE))
@example({"E": -1})
@example({"A": 1e299, "alpha": 2})
def test_any_law(scratch, change):
    law = outcome(lambda path: read_law(str(path)), scratch, "law.json", json.dumps(LAW | change).encode())
    if law is not None:
        predicted = outcome(lambda path: law.predict(1e9, 4), scratch, "law.json", b"")
        assert predicted is None or 0 <= predicted < math.inf
