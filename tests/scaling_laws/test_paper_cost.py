"""The paper's analytic costs, figure by figure, from the code alone."""

import pytest

from parscale.scaling_laws import cost, published_models, read_shape
from parscale.scaling_laws.headline import average, dense_of_equal_loss, increase_ratios

GIB = 2**30

# (batch, model): memory in GiB and latency in s at P = 1, 2, 4, 8; by the code released with arXiv 2505.10475
TABLE = {
    (1, "1.6B"): [(3.442, 0.483), (3.479, 0.494), (3.515, 0.514), (3.587, 0.555)],
    (1, "2.8B"): [(5.832, 0.823), (5.881, 0.840), (5.933, 0.870), (6.037, 0.932)],
    (1, "4.4B"): [(8.921, 1.262), (8.984, 1.286), (9.054, 1.329), (9.193, 1.415)],
    (8, "1.6B"): [(4.004, 0.553), (4.240, 0.644), (4.466, 0.807), (4.919, 1.134)],
    (8, "2.8B"): [(6.423, 0.927), (6.706, 1.065), (7.011, 1.312), (7.623, 1.805)],
    (8, "4.4B"): [(9.541, 1.405), (9.872, 1.600), (10.259, 1.946), (11.033, 2.637)],
}
# batch: how many times more memory and time the dense model of equal loss adds
RATIOS = {1: (22.5, 6.4), 2: (12.8, 3.25), 4: (6.9, 1.67), 8: (3.6, 0.88)}


@pytest.mark.parametrize(("batch", "size"), TABLE)
def test_cost_table(batch, size):
    """To the last printed digit, which is finer than 1 %."""
    for streams, (memory, latency) in zip((1, 2, 4, 8), TABLE[batch, size], strict=True):
        counted_memory, counted_latency = average(size, streams, batch)
        assert round(counted_memory / GIB, 3) == memory
        assert round(counted_latency, 3) == latency


@pytest.mark.parametrize("batch", RATIOS)
def test_how_much_less_streams_add(batch):
    """22.5 and 6.4 times at batch 1, and what becomes of them: at batch 8 streams are slower than the dense model."""
    assert increase_ratios(batch) == pytest.approx(RATIOS[batch], rel=1e-2)


def test_the_dense_model_of_equal_loss():
    memory, latency = dense_of_equal_loss(8, "1.6B")
    assert memory / GIB == pytest.approx(6.715, rel=1e-3)
    assert latency == pytest.approx(0.948, rel=1e-3)


def test_one_length_of_the_released_command():
    """`cost_analysis.py --hidden_size 2560 --intermediate_size 13824 --P 2 --batch_size 2`, its default lengths of
    64.
    """
    result = cost(
        published_models()["4.4B"], num_streams=2, batch_size=2, input_length=64, output_length=64, method="paper"
    )
    assert round(result.memory_bytes / GIB, 3) == 8.951
    assert round(result.seconds, 3) == 0.354


def test_parts_add_up():
    for streams in (1, 8):
        result = cost(
            published_models()["2.8B"],
            num_streams=streams,
            batch_size=4,
            input_length=256,
            output_length=64,
            method="paper",
        )
        assert sum(result.memory.values()) == result.memory_bytes
        assert sum(result.time.values()) == pytest.approx(result.seconds)
        assert result.prefill_seconds + result.decode_seconds + result.time["aggregator"] == pytest.approx(
            result.seconds
        )


def test_no_figure_where_the_paper_has_none():
    with pytest.raises(ValueError, match=r"no published point for '9B' at P = 8; sizes are 0.5B, 0.7B"):
        dense_of_equal_loss(8, "9B")
    with pytest.raises(ValueError, match=r"no published point for '1.6B' at P = 3"):
        dense_of_equal_loss(3, "1.6B")
    with pytest.raises(ValueError, match=r"loss 0.9794 is not between two published plain models"):
        dense_of_equal_loss(8, "4.4B")
    with pytest.raises(ValueError, match="no published model '9B'"):
        average("9B", 1, 1)
    sparse = published_models()["1.6B"] | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
    work = {"num_streams": 1, "batch_size": 1, "input_length": 64, "output_length": 64, "method": "paper"}
    with pytest.raises(ValueError, match=r"the paper's count is for dense models .* use method=\"roofline\""):
        cost(sparse, **work)
    with pytest.raises(ValueError, match=r"supports 16 bits and no overhead, not dtype 'float32'"):
        cost(published_models()["1.6B"], **work, dtype="float32")


def test_wider_models_are_counted_whatever_their_heads():
    """12 heads of a wider model's hidden size / 12 are together that size, but for the last bit of a float."""
    sizes = {"hidden_size": 1152, "intermediate_size": 3456, "num_hidden_layers": 24, "vocab_size": 32000}
    shape = read_shape({"model_type": "llama", "num_attention_heads": 12, **sizes})
    work = {"num_streams": 1, "batch_size": 1, "input_length": 64, "output_length": 64, "method": "paper"}
    wider = [shape.scaled(1 + step / 97) for step in range(1, 97)]
    assert any(each.attention[0].query != each.hidden for each in wider)
    plain = cost(shape, **work).seconds
    assert all(plain < cost(each, **work).seconds < 5 * plain for each in wider)
