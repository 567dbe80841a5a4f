"""States of constant size: against the caches that transformers builds, and against closed forms."""

import json

import pytest
import torch
from cost_by_hand import BYTES_ONLY, FLOPS_ONLY
from counted_models import fields_of, kept_states, tiny_models

from parscale.cli.application import run
from parscale.scaling_laws import ParallelScalingLaw, cost, published_models, read_shape, versus

# With fields that make sizes differ which are equal in the tiny model.
FAMILIES = {
    "BailingHybridForCausalLM": {},
    "BambaForCausalLM": {"mamba_n_groups": 2},
    "GraniteMoeHybridForCausalLM": {"mamba_n_groups": 2},
    "InklingForCausalLM": {"swa_num_key_value_heads": 4, "swa_head_dim": 16},
    "JambaForCausalLM": {},
    "KimiLinearForCausalLM": {},
    "Lfm2ForCausalLM": {},
    "Lfm2MoeForCausalLM": {},
    "Lfm3ForCausalLM": {},
    "MiniMaxForCausalLM": {"head_dim": 16},
    "OlmoHybridForCausalLM": {"linear_value_head_dim": 12},
    "Qwen3NextForCausalLM": {"linear_value_head_dim": 12},
    "Qwen3_5ForCausalLM": {"linear_value_head_dim": 12},
    "Qwen3_5MoeForCausalLM": {"linear_value_head_dim": 12},
    "RecurrentGemmaForCausalLM": {"lru_width": 32, "conv1d_width": 3},
    "ZayaForCausalLM": {"cca_time0": 3},
}
# The published sizes of Qwen3-Next-80B-A3B: three of four layers are linear attention.
QWEN3_NEXT = {
    "model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 48, "full_attention_interval": 4,
    "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "intermediate_size": 5120,
    "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4, "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512, "decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": 151936,
    "tie_word_embeddings": False,
}  # fmt: skip
MATRICES = 36 * 32 * 128 * 128  # one for each value head of each linear layer
CONVOLVED = 36 * 4 * (2 * 16 * 128 + 32 * 128)  # four tokens of queries, keys and values
WORK = {"batch_size": 3, "input_length": 5}


@pytest.mark.parametrize("name", FAMILIES)
def test_states_are_those_that_the_model_keeps(name):
    """To the byte, in bfloat16: recurrent states that transformers keeps in float32 are counted so."""
    if name not in tiny_models.names():
        pytest.skip(f"no {name} in this transformers")
    special = tiny_models.SPECIAL.get(name, {}) | FAMILIES[name]
    config = tiny_models.tiny_config(tiny_models.Tiny(name).cls.config_class, 6, special)
    model = tiny_models.Tiny(name).cls(config).bfloat16().eval()
    with torch.no_grad():
        output = model(torch.randint(3, tiny_models.FIRST_SPECIAL, (2, 7)), use_cache=True)
    kept = sum(tensor.nbytes for tensor in kept_states(model, getattr(output, "past_key_values", None)))
    result = cost(fields_of(config), num_streams=1, batch_size=2, input_length=7, output_length=1)
    assert result.memory["states"] == kept > 0
    assert not result.notes


def test_states_of_qwen3_next_in_memory_and_in_a_step():
    """Twelve rows keep them; a step reads and writes each, and multiplies and adds twice for each element."""
    shape = read_shape(QWEN3_NEXT)
    assert shape.state_elements == MATRICES + CONVOLVED
    size = 12 * (4 * MATRICES + 2 * CONVOLVED)
    for device, step in ((BYTES_ONLY, 2 * size), (FLOPS_ONLY, 2 * 2 * 12 * (MATRICES + CONVOLVED))):
        one, two = (cost(shape, num_streams=4, output_length=n, hardware=device, **WORK) for n in (1, 2))
        assert one.memory["states"] == two.memory["states"] == size
        assert two.time["states"] - one.time["states"] == pytest.approx(step)
    assert one.time["states"] == pytest.approx(5 * step)  # five tokens of prompt
    assert (
        size / 12 == 74.25 * 2**20 == 3168 * 12 * 2 * 2 * 2 * 256
    )  # tokens of keys and values, as docs/how/law.md says
    assert not one.notes


def test_a_model_with_keys_alone_keeps_no_state():
    result = cost(published_models()["0.5B"], num_streams=2, output_length=2, **WORK)
    assert result.memory["states"] == 0
    assert "states" not in result.time


@pytest.mark.parametrize("field", ["mamba_d_state", "mamba_d_conv"])
def test_a_file_that_does_not_say_how_large_states_are_is_noted(field):
    fields = fields_of(tiny_models.Tiny("JambaForCausalLM").config())
    result = cost(
        {name: value for name, value in fields.items() if name != field}, num_streams=1, output_length=1, **WORK
    )
    assert result.memory["states"] == 0
    (note,) = result.notes
    assert note.startswith("1 of 2 layers keep no keys and values: their weights are counted; what they read of images")


@pytest.mark.parametrize("name", ["Qwen3NextForCausalLM", "Lfm2ForCausalLM", "ZayaForCausalLM"])
def test_streams_that_keep_states_share_no_keys(name):
    if name not in tiny_models.names():
        pytest.skip(f"no {name} in this transformers")
    fields = fields_of(tiny_models.Tiny(name).config())
    with pytest.raises(ValueError, match=r"keep a state, of which each stream needs its own.*use kv=\"own\""):
        cost(fields, num_streams=2, output_length=1, kv="shared", **WORK)
    assert cost(fields, num_streams=1, output_length=1, kv="shared", **WORK).memory["states"] > 0


def test_the_model_of_equal_loss_has_wider_states():
    law = ParallelScalingLaw(E=0.6912, A=1.131e7, alpha=0.1894, k=0.3935)
    found = versus(law, QWEN3_NEXT, num_streams=4)
    assert found.plain.memory["states"] < found.dense.memory["states"] < found.streams.memory["states"]


def test_the_command_counts_states(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_NEXT))
    command = ["cost", str(path), "--num-streams", "1", "4", "--batch-size", "3"]
    assert run([*command, "--json"]) == 0
    one, four = json.loads(capsys.readouterr().out)["costs"]
    assert 4 * one["memory"]["states"] == four["memory"]["states"] == 12 * (4 * MATRICES + 2 * CONVOLVED)
    assert four["memory_vs_dense"] > 0
    assert run([*command, "--kv", "shared"]) == 2
    assert "layers of 'qwen3_next' keep a state" in capsys.readouterr().err
