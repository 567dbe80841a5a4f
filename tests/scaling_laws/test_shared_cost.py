"""The roofline count of streams that share keys and values, against closed forms worked out by hand."""

import json

import pytest
from cost_by_hand import BYTES_ONLY, FLOPS_ONLY, LAYER, TINY

from parscale.cli.application import run
from parscale.scaling_laws import ParallelScalingLaw, cost, published_models, read_shape, versus

KEYS_AND_VALUES = 2 * 2 * 2  # of one token in one layer: two heads of two
WORK = {"batch_size": 2, "input_length": 7, "output_length": 1, "kv": "shared"}


def test_arithmetic_of_a_prompt_by_hand():
    """B = 2, P = 3, S = 7, T = 5: two rows read the prompt, and then four rows its last token behind a prefix."""
    result = cost(TINY, num_streams=3, hardware=FLOPS_ONLY, **WORK)
    assert result.time["projections"] + result.time["mlp"] == pytest.approx(2 * 3 * LAYER * (2 * 7 + 4))
    pairs = 2 * (7 * 8 // 2) + 4 * (7 + 5)
    assert result.time["attention"] == pytest.approx(3 * pairs * 2 * (8 + 8))
    assert result.time["aggregator"] == pytest.approx(2 * 2 * ((3 * 8 * 8 + 8) + (8 * 3 + 3) + 3 * 8))
    assert result.time["embedding_and_head"] == pytest.approx(2 * 2 * 10 * 8)  # the mixture's, once


def test_arithmetic_of_a_step_by_hand():
    """The one step after a prompt of four: six rows see five tokens each, and four of them a prefix."""
    one, two = (
        cost(TINY, num_streams=3, hardware=FLOPS_ONLY, **WORK | {"input_length": 4, "output_length": n}) for n in (1, 2)
    )
    assert two.time["attention"] - one.time["attention"] == pytest.approx(3 * (6 * 5 + 4 * 5) * 2 * 16)
    assert two.time["mlp"] - one.time["mlp"] == pytest.approx(2 * 6 * 3 * 3 * 8 * 16)


def test_a_step_reads_the_cache_once_for_all_streams():
    """Beside it each prefix once, and what goes in and out of attention for each row."""
    one, two = (
        cost(TINY, num_streams=3, hardware=BYTES_ONLY, **WORK | {"input_length": 4, "output_length": n}) for n in (1, 2)
    )
    read = 3 * KEYS_AND_VALUES * (2 * 5 + 2 * 5)  # rows of the cache times tokens, streams with a prefix times T
    assert two.time["attention"] - one.time["attention"] == pytest.approx(2 * (read + 6 * 3 * (8 + 8)))


def test_memory_by_hand():
    result = cost(TINY, num_streams=3, hardware=BYTES_ONLY, **WORK | {"output_length": 4})
    assert result.memory["kv_cache"] == 2 * 2 * 3 * KEYS_AND_VALUES * (7 + 4 - 1)  # 16 bits, two rows, three layers
    assert result.memory["prefixes"] == 2 * 2 * 3 * KEYS_AND_VALUES * 5
    plain = cost(TINY, num_streams=1, hardware=BYTES_ONLY, **WORK | {"output_length": 4})
    assert result.memory["kv_cache"] == plain.memory["kv_cache"]
    assert result.memory["activations"] < 2 * plain.memory["activations"]  # the prompt's, of two rows
    assert result.params == read_shape(TINY).params(3) - 3 * KEYS_AND_VALUES * 5


LATENT = {"kv_lora_rank": 6, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 4, "num_key_value_heads": 4}
MADE = 6 * 4 * (3 + 4)  # the matrix from latents to keys and values


@pytest.mark.parametrize(("kv", "rows", "prefixes"), [("own", 6, 3), ("shared", 2, 2)])
def test_a_step_makes_keys_of_all_latents_in_the_cache(kv, rows, prefixes):
    """The one step after a prompt of four: each of five latents in each row of the cache, in each of three layers."""
    work = WORK | {"input_length": 4, "kv": kv}
    flops, moved = (
        [cost(TINY | LATENT, num_streams=3, hardware=device, **work | {"output_length": n}).time for n in (1, 2)]
        for device in (FLOPS_ONLY, BYTES_ONLY)
    )
    pairs = 6 * 5 + 2 * prefixes * 5
    assert flops[1]["attention"] - flops[0]["attention"] == pytest.approx(
        3 * 2 * (pairs * 4 * (5 + 4) + rows * 5 * MADE)
    )
    layer = 8 * 4 * 5 + 8 * (6 + 2) + 4 * 4 * 8  # queries, latents and output; keys and values are made in attention
    assert flops[1]["projections"] - flops[0]["projections"] == pytest.approx(3 * 2 * 6 * layer)
    keys = 4 * (5 + 4)
    read = (rows * 5 + prefixes * 5) * keys + 6 * 4 * (5 + 4) + rows * 4 * (6 + 2 + keys)
    assert moved[1]["attention"] - moved[0]["attention"] == pytest.approx(2 * 3 * read)


def test_keys_of_one_layer_are_held_beside_the_latents():
    longer, longest = (
        cost(TINY | LATENT, num_streams=1, hardware=BYTES_ONLY, **WORK | {"output_length": n}).memory
        for n in (101, 201)
    )
    assert longest["kv_cache"] - longer["kv_cache"] == 2 * 2 * 3 * (6 + 2) * 100
    assert longest["activations"] - longer["activations"] == 2 * 2 * 4 * (5 + 4) * 100


def test_an_indexer_reads_a_key_of_its_own_for_each_token():
    indexed = {"model_type": "deepseek_v32", "index_n_heads": 3, "index_head_dim": 7, "q_lora_rank": 9}
    plain, with_indexer = ({"model_type": "deepseek_v3", "q_lora_rank": 9} | LATENT, indexed | LATENT)
    work = {"num_streams": 1, "batch_size": 2, "input_length": 4}

    def added(n, device):
        have, base = (
            cost(TINY | each, hardware=device, **work | {"output_length": n}) for each in (with_indexer, plain)
        )
        return have.time["attention"] - base.time["attention"], have.memory["kv_cache"] - base.memory["kv_cache"]

    assert added(1, BYTES_ONLY)[1] == 2 * 2 * 3 * 4 * 7
    for device, expected in ((FLOPS_ONLY, 2 * 2 * 5 * 3 * (7 + 1)), (BYTES_ONLY, 2 * 2 * (5 + 3) * 7)):
        assert added(2, device)[0] - added(1, device)[0] == pytest.approx(3 * expected)


@pytest.mark.parametrize("kv", ["own", "shared"])
def test_one_stream_shares_with_nobody(kv):
    work = {"batch_size": 4, "input_length": 100, "output_length": 50, "num_streams": 1}
    assert cost(published_models()["1.6B"], **work, kv=kv) == cost(published_models()["1.6B"], **work)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("streams", [2, 8])
def test_sharing_costs_less_the_longer_the_prompt(streams, batch):
    """At every length less than own caches, and ever nearer to the plain model."""
    model, ratios = published_models()["1.6B"], []
    for length in (64, 512, 4096, 32768):
        work = {"batch_size": batch, "input_length": length, "output_length": 64, "hardware": "h100"}
        plain = cost(model, num_streams=1, **work)
        own, shared = (cost(model, num_streams=streams, kv=kv, **work) for kv in ("own", "shared"))
        assert shared.memory_bytes < own.memory_bytes
        assert shared.seconds < own.seconds or length == 64  # two passes read all weights twice
        assert shared.decode_seconds <= own.decode_seconds
        ratios.append(shared.prefill_seconds / plain.prefill_seconds)
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] < 1.05


def test_a_step_of_eight_streams_costs_little_more_than_a_plain_one():
    """The 1.6B model on an H100, one row: at any length within 1.10, where own caches leave that behind at 4096."""
    model = published_models()["1.6B"]
    for length in (512, 4096, 32768):
        work = {"batch_size": 1, "input_length": length, "output_length": 2, "hardware": "h100"}
        plain = cost(model, num_streams=1, **work).decode_seconds
        own, shared = (cost(model, num_streams=8, kv=kv, **work).decode_seconds / plain for kv in ("own", "shared"))
        assert shared < 1.10
        assert own > shared
    assert own > 2


def test_against_the_plain_model_of_equal_loss():
    law = ParallelScalingLaw(E=0.6912, A=1.131e7, alpha=0.1894, k=0.3935)
    work = {"num_streams": 8, "batch_size": 8, "input_length": 4096}
    own, shared = (versus(law, published_models()["1.6B"], kv=kv, **work) for kv in ("own", "shared"))
    assert shared.ratio("seconds") < own.ratio("seconds")
    assert shared.ratio("memory_bytes") < own.ratio("memory_bytes")
    assert shared.plain == own.plain


def test_what_is_refused():
    with pytest.raises(ValueError, match="no kv 'both'; give one of own, shared"):
        cost(TINY, num_streams=2, **WORK | {"kv": "both"})
    with pytest.raises(ValueError, match=r"the paper's count supports kv=\"own\" only"):
        cost(published_models()["1.6B"], num_streams=2, method="paper", **WORK)


def test_the_command_shows_both_side_by_side(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published_models()["1.6B"]))
    command = ["cost", str(path), "--num-streams", "1", "8", "--batch-size", "1"]
    assert run([*command, "--kv", "own", "shared", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(row["streams"], row["kv"]) for row in shown["costs"]] == [
        (1, "own"), (1, "shared"), (8, "own"), (8, "shared")
    ]  # fmt: skip
    own, shared = shown["costs"][2:]
    expected = cost(path, num_streams=8, batch_size=1, input_length=256, output_length=256, kv="shared")
    assert shared["memory"] == expected.memory
    assert shared["memory_gib"] < own["memory_gib"]
    assert [found["kv"] for found in shown["crossovers"]] == ["own", "shared"]
    assert run(command) == 0
    assert "kv" not in capsys.readouterr().out.splitlines()[0].split()
    assert run([*command, "--kv", "shared"]) == 0
    assert "P = 8, shared keys and values:" in capsys.readouterr().out
