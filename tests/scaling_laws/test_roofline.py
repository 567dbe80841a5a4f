"""The roofline count against closed forms worked out by hand, and what must hold whatever the numbers."""

import dataclasses

import pytest
from cost_by_hand import BYTES_ONLY, FLOPS_ONLY, LAYER, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from parscale.scaling_laws import (
    Hardware,
    cost,
    known_hardware,
    published_models,
    read_hardware,
    read_shape,
    training_memory,
)

MODEL = published_models()["1.6B"]
WORK = {"num_streams": 1, "batch_size": 1, "input_length": 256, "output_length": 256}


def test_arithmetic_of_a_prefill_by_hand():
    """B = 2, P = 3, S = 7, T = 5: six rows of seven tokens, each of which sees its prefix, its past and itself."""
    result = cost(TINY, num_streams=3, batch_size=2, input_length=7, output_length=1, hardware=FLOPS_ONLY)
    pairs = 6 * (7 * 8 // 2 + 7 * 5)
    assert result.time["projections"] + result.time["mlp"] == pytest.approx(2 * 42 * 3 * LAYER)
    assert result.time["attention"] == pytest.approx(3 * pairs * 2 * (8 + 8))
    assert result.time["aggregator"] == pytest.approx(2 * 14 * ((3 * 8 * 8 + 8) + (8 * 3 + 3) + 3 * 8))
    assert result.time["embedding_and_head"] == pytest.approx(2 * 2 * 10 * 8)  # two last tokens, not six
    assert result.decode_seconds == 0


def test_arithmetic_of_decoding_by_hand():
    """The three steps after a prompt of four see 5, 6 and 7 tokens."""
    one = cost(TINY, num_streams=1, batch_size=1, input_length=4, output_length=1, hardware=FLOPS_ONLY)
    four = cost(TINY, num_streams=1, batch_size=1, input_length=4, output_length=4, hardware=FLOPS_ONLY)
    assert four.time["attention"] - one.time["attention"] == pytest.approx(3 * (5 + 6 + 7) * 2 * 16)
    assert four.time["mlp"] - one.time["mlp"] == pytest.approx(3 * 2 * 3 * 3 * 8 * 16)


def test_traffic_of_decoding_by_hand():
    """Each step reads every weight and the cache once, the prefixes once for each stream and not for each row."""
    base, more = (
        cost(TINY, num_streams=3, batch_size=4, input_length=4, output_length=length, hardware=BYTES_ONLY)
        for length in (1, 2)
    )
    step = {name: more.time[name] - base.time[name] for name in more.time}
    cached = 12 * 5 + 3 * 5  # twelve rows of five tokens, three prefixes of five
    assert step["attention"] == pytest.approx(2 * 3 * (cached * 8 + 12 * (8 + 8)))
    assert step["embedding_and_head"] == pytest.approx(2 * (80 + 4 * 10 + 2 * 12 * 8))
    weights = 2 * 3 * LAYER
    activations = 2 * 12 * 3 * ((2 * 8 + 8 + 8 + 8) + (2 * 8 + 3 * 16))
    assert step["projections"] + step["mlp"] == pytest.approx(weights + activations)


def test_memory_by_hand():
    result = cost(TINY, num_streams=3, batch_size=4, input_length=6, output_length=2, dtype="float32")
    assert result.memory["weights"] == 4 * (3 * (LAYER + 16) + 8 + 80)
    assert result.memory["prefixes"] == 4 * 3 * 3 * 5 * 8
    assert result.memory["aggregator"] == 4 * (3 * 64 + 8 + 24 + 3)
    assert result.memory["kv_cache"] == 4 * 12 * 7 * 3 * 8  # of the eighth token nothing is kept
    # in the pass over the prompt the residual stream and the MLP's two inner tensors; logits of one token a row
    assert result.memory["activations"] == 4 * 12 * 6 * (8 + 2 * 16) + 4 * 4 * 10
    assert sum(result.memory.values()) == result.memory_bytes


def test_a_plain_model_has_nothing_of_the_streams():
    result = cost(MODEL, **WORK)
    assert result.memory["prefixes"] == result.memory["aggregator"] == 0
    assert "aggregator" not in result.time
    assert result.params == 1_571_472_384


def test_decoding_at_batch_one_is_bound_by_reading_the_weights():
    device = known_hardware()["a100-80gb"]
    result = cost(MODEL, **WORK)
    floor = 255 * result.memory["weights"] / device.bandwidth
    assert floor < result.decode_seconds < 1.05 * floor


def test_a_sliding_window_bounds_cache_and_attention():
    windowed = MODEL | {"sliding_window": 128, "layer_types": ["sliding_attention"] * 36}
    long = {**WORK, "input_length": 4096}
    full, narrow = cost(MODEL, **long), cost(windowed, **long)
    assert narrow.memory["kv_cache"] == pytest.approx(full.memory["kv_cache"] * 128 / (4096 + 255))
    assert narrow.time["attention"] < full.time["attention"]
    wide = MODEL | {"sliding_window": 10**6, "layer_types": ["sliding_attention"] * 36}
    assert cost(wide, **long).time == pytest.approx(full.time)
    exact = cost(
        TINY | {"sliding_window": 3, "layer_types": ["sliding_attention"] * 3},
        num_streams=1, batch_size=1, input_length=7, output_length=1, hardware=FLOPS_ONLY,
    )  # fmt: skip
    assert exact.time["attention"] == pytest.approx(3 * (1 + 2 + 3 * 5) * 2 * 16)


def test_only_the_experts_that_are_met_are_read():
    sparse = TINY | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "model_type": "qwen3_moe"}
    expert = 3 * 8 * 16

    def mlp(batch):
        one, two = (
            cost(sparse, num_streams=1, batch_size=batch, input_length=1, output_length=n, hardware=BYTES_ONLY).time[
                "mlp"
            ]
            for n in (1, 2)
        )
        activations = 2 * batch * 3 * (2 * 8 + 3 * 2 * 16)
        return (two - one - activations) / (2 * 3) - 8 * 8

    assert mlp(1) == pytest.approx(2 * expert)
    assert mlp(1000) == pytest.approx(8 * expert)


def test_quantised_weights_shrink_and_the_cache_does_not():
    sixteen, eight, four = (cost(MODEL, **WORK, dtype=dtype) for dtype in ("bfloat16", "int8", "int4"))
    embedding = 151_936 * 1536 * 2  # bytes; it keeps 16 bits, as the output matrix, which is the same
    assert eight.memory["weights"] - embedding == (sixteen.memory["weights"] - embedding) / 2
    assert four.memory["weights"] < eight.memory["weights"]
    assert four.memory["kv_cache"] == sixteen.memory["kv_cache"]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_weights_are_those_that_training_memory_counts(dtype):
    """Those of a frozen backbone, and of streams in 32 bits that train; norms, which one of both quantizes, are few."""
    memory = training_memory(MODEL, num_streams=4, batch_size=1, sequence_length=8, frozen_dtype=dtype)
    streams = 4 * (cost(MODEL, **WORK | {"num_streams": 4}).params - cost(MODEL, **WORK).params)
    assert memory.memory["weights"] - streams == pytest.approx(
        cost(MODEL, **WORK, dtype=dtype).memory["weights"], rel=1e-3
    )


def test_a_shared_prompt_is_two_passes_to_the_overhead():
    work = WORK | {"num_streams": 4, "kv": "shared"}
    ideal, real = cost(MODEL, **work), cost(MODEL, **work, overhead=1e-4)
    assert real.prefill_seconds - ideal.prefill_seconds == pytest.approx(2 * 36 * 1e-4)
    assert real.seconds - ideal.seconds == pytest.approx(257 * 36 * 1e-4)


def test_overhead_is_added_for_each_layer_and_step():
    ideal, real = cost(MODEL, **WORK), cost(MODEL, **WORK, overhead=1e-4)
    assert real.seconds - ideal.seconds == pytest.approx(256 * 36 * 1e-4)
    assert real.prefill_seconds - ideal.prefill_seconds == pytest.approx(36 * 1e-4)


@pytest.mark.parametrize("spare", [0.97, 1.0])
def test_whether_it_fits_is_said(spare):
    """A device's GB are powers of ten: 7 % less than those of two."""
    used = cost(MODEL, **WORK).memory_bytes
    device = dataclasses.replace(known_hardware()["a100-80gb"], memory_gb=spare * used / 1e9)
    assert cost(MODEL, **WORK, hardware=device).fits is (spare == 1.0)
    assert cost(MODEL, **WORK).fits
    assert not cost(MODEL, **{**WORK, "batch_size": 10_000}).fits


def test_layers_without_a_cache_are_said():
    hybrid = MODEL | {"layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 9}
    result = cost(hybrid, **WORK)
    assert "27 of 36 layers keep no keys and values" in result.notes[0]
    assert cost(MODEL, **WORK).memory["kv_cache"] == 4 * result.memory["kv_cache"]


@settings(max_examples=40, deadline=None)
@given(
    streams=st.sampled_from([1, 2, 4, 8]),
    batch=st.integers(1, 64),
    length=st.integers(1, 3000),
    answer=st.integers(1, 300),
    hardware=st.sampled_from(sorted(known_hardware())),
)
def test_more_of_anything_never_costs_less(streams, batch, length, answer, hardware):
    def at(**change):
        work = {"num_streams": streams, "batch_size": batch, "input_length": length, "output_length": answer}
        return cost(MODEL, **(work | change), hardware=hardware)

    base = at()
    assert sum(base.memory.values()) == pytest.approx(base.memory_bytes)
    assert sum(base.time.values()) == pytest.approx(base.seconds)
    assert base.prefill_seconds + base.decode_seconds == pytest.approx(base.seconds)
    more = [
        at(num_streams=2 * streams), at(batch_size=batch + 1), at(input_length=length + 1), at(output_length=answer + 1)
    ]  # fmt: skip
    for other in more:
        assert other.memory_bytes >= base.memory_bytes
        assert other.seconds >= base.seconds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_streams": 0}, "num_streams is 0; it must be a whole number of at least 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"input_length": -1}, "input_length is -1"),
        ({"output_length": True}, "output_length is True"),
        ({"method": "guess"}, "no method 'guess'; give one of roofline, paper"),
        ({"dtype": "float8"}, "no dtype 'float8'; give one of float32, bfloat16"),
        ({"overhead": -1.0}, "overhead is -1.0; it must be at least 0 seconds"),
        ({"hardware": "abacus"}, "no hardware 'abacus'; give one of a100-40gb, a100-80gb"),
    ],
)
def test_impossible_work_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        cost(MODEL, **(WORK | change))


def test_the_table_has_what_is_promised():
    names = set(known_hardware())
    assert {"a100-80gb", "h100", "h200", "b200", "l40s", "rtx-4090", "apple-m4-max", "cpu-desktop"} <= names
    a100 = known_hardware()["a100-80gb"]
    assert a100.bandwidth == pytest.approx(0.9 * 2039e9)
    assert a100.flops(16) == pytest.approx(0.7 * 312e12)


@pytest.mark.parametrize(("name", "sold_as"), [("a100-80gb", 80), ("h200", 141), ("rtx-4090", 24), ("mi300x", 192)])
def test_a_makers_gigabytes_are_gibibytes_less_a_reserve(name, sold_as):
    assert sold_as * 1e9 < known_hardware()[name].memory_gb * 1e9 < sold_as * 2**30


def test_anyone_can_add_a_device(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("# mine\nname,label,memory_gb,bandwidth_gbs,tflops_16bit,tflops_32bit\nmine,Mine,8,100,10,5\n")
    mine = read_hardware(path)["mine"]
    assert mine.bandwidth_efficiency == 0.9
    assert cost(MODEL, **WORK, hardware=mine).seconds > cost(MODEL, **WORK).seconds
    twice = dataclasses.replace(mine, bandwidth_gbs=200, tflops_16bit=20)
    assert cost(MODEL, **WORK, hardware=twice).seconds == pytest.approx(cost(MODEL, **WORK, hardware=mine).seconds / 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("mine,Mine,8,,10,5", "mine has no bandwidth_gbs; every device needs it"),
        ("mine,Mine,8,fast,10,5", "mine: could not convert string to float: 'fast'; all columns but name and label"),
        ("mine,Mine,8,-1,10,5", "bandwidth_gbs of 'mine' is -1; it must be above 0"),
    ],
)
def test_impossible_devices_are_refused_by_name(tmp_path, row, message):
    path = tmp_path / "mine.csv"
    path.write_text(f"name,label,memory_gb,bandwidth_gbs,tflops_16bit,tflops_32bit\n{row}\n")
    with pytest.raises(ValueError, match=message):
        read_hardware(path)


def test_efficiencies_are_shares():
    with pytest.raises(ValueError, match=r"flops_efficiency of 'x' is 1.5; it must be above 0 and at most 1"):
        Hardware("x", "", 1, 1, 1, 1, 1.5)


def test_a_shape_serves_as_a_configuration():
    assert cost(read_shape(MODEL), **WORK) == cost(MODEL, **WORK)


@pytest.mark.parametrize("kv", ["own", "shared"])
def test_the_largest_batches_are_counted_as_others_are(kv):
    """In proportion, once weights do not count; a sum of whole numbers with 64 bits would have gone over."""
    work = {"num_streams": 8, "input_length": 32_768, "output_length": 2, "kv": kv, "hardware": "h100"}
    small, large = (cost(MODEL, batch_size=batch, **work).seconds / batch for batch in (2**12, 2**20))
    assert large == pytest.approx(small, rel=1e-2)
