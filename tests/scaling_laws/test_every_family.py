"""Parameters, caches and arithmetic of every family of language models, against the model that transformers builds.

The models have their family's default sizes, on the meta device, which computes shapes alone.
"""

import pytest
import torch
import transformers
from cost_by_hand import FLOPS_ONLY
from counted_models import fields_of, kept_states, tiny_models
from huggingface_hub.errors import StrictDataclassError
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as MULTIMODAL

from parscale.scaling_laws import cost, read_shape

# What the default of a class leaves out.
FIELDS = {
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 6},
    "GraniteMoeHybridForCausalLM": {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
    "HunYuanMoEV1ForCausalLM": {"num_experts": 4, "moe_topk": 2, "head_dim": 128},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
}
BY_DAY = [
    "AXK2ForCausalLM", "BertLMHeadModel", "DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM", "Dots3NoteForCausalLM",
    "GlmMoeDsaForCausalLM", "HYV4ForCausalLM", "HunYuanMoEV1ForCausalLM", "Inkling2ForCausalLM", "Lfm2ForCausalLM",
    "Llama4ForCausalLM", "MiniMaxForCausalLM", "OlmoHybridForCausalLM", "Qwen3_5ForCausalLM",
    "RecurrentGemmaForCausalLM",
]  # fmt: skip
# Their models hold what is not counted: the part that sees, rows of zero experts, heads that a file would not name.
HOLD_MORE = {"GitForCausalLM", "LongcatFlashForCausalLM", "Qwen2_5OmniThinkerForConditionalGeneration"}
HOLD_MORE |= {"Qwen2_5OmniForConditionalGeneration"}
LENGTHS = (128, 256)


def counted(name, make):
    """A class, a configuration and its shape; None where there is no default, or its cost is refused."""
    cls = getattr(transformers, name)
    try:
        config = make(cls.config_class, FIELDS.get(name, {}))
        return cls, config, read_shape(fields_of(config))
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError):
        return None


def wrong_parameters(name):
    """What differs, as a sentence; None if the class is not counted or cannot be built."""
    found = counted(name, lambda cls, fields: cls(**fields))
    if found is None or name in HOLD_MORE:
        return None
    cls, config, shape = found
    try:
        with torch.device("meta"):
            model = cls(config)
    except (TypeError, KeyError, AttributeError, ImportError, ValueError):
        return None
    text = model.get_decoder() if shape.other_parts else model
    embedding = [module for module in text.modules() if isinstance(module, torch.nn.Embedding)]
    output = [head] if (head := model.get_output_embeddings()) is not None else []
    total = numbers([text, *output])
    pairs = {
        "all parameters": (shape.backbone_params + shape.embedding_params, total),
        "parameters of layers": (shape.backbone_params, total - numbers([*embedding, *output])),
    }
    return differing(name, pairs, 0.05)


def numbers(modules):
    return sum({id(each): each.numel() for module in modules for each in module.parameters()}.values())


def differing(name, pairs, share):
    return ", ".join(
        f"{name}: {what} {have:,.0f}, in the model {want:,.0f}"
        for what, (have, want) in pairs.items()
        if have != pytest.approx(want, rel=share)
    )


def wrong_step(name):
    """As `wrong_parameters`, of a cache and of one step after a prompt of either length, in two layers."""
    found = counted(name, lambda cls, fields: tiny_models.tiny_config(cls, 6, fields, tiny_models.DEPTH))
    if found is None:
        return None
    cls, config, shape = found
    config._attn_implementation, config._experts_implementation = "eager", "batched_mm"
    try:
        with torch.device("meta"):
            model = cls(config).eval()
            measured = [step(model, length) for length in LENGTHS]
    except (TypeError, KeyError, AttributeError, ImportError, ValueError, RuntimeError, NotImplementedError):
        return None
    work = {"num_streams": 1, "batch_size": 1, "hardware": FLOPS_ONLY, "dtype": "float32"}
    expected = []
    for length in LENGTHS:
        one, two = (cost(shape, input_length=length, output_length=n, **work) for n in (1, 2))
        products = one.time.keys() - {"norms", "states"}
        flops = sum(two.time[part] - one.time[part] for part in products)
        expected.append((one.memory["kv_cache"], flops))
    (less, before, states), (more, after, _) = measured
    (counted_less, counted_before), (counted_more, counted_after) = expected
    pairs = {
        "bytes of tokens in the cache": (counted_more - counted_less, more - less),
        "elements of states": (shape.state_elements, states),
        "operations of a step": (counted_before, before),
        "further operations after a longer prompt": (counted_after - counted_before, after - before),
    }
    return differing(name, pairs, 0.05)


def step(model, length):
    """Bytes of the cache of a prompt, operations of products in the step after it, elements of states."""
    ids = torch.zeros(1, length + 1, dtype=torch.long)
    with torch.no_grad():
        cache = model(ids[:, :length], use_cache=True).past_key_values
        names = ("keys", "values", "indexer_keys")
        kept = [getattr(layer, name, None) for layer in cache.layers for name in names]
        size = sum(tensor.nbytes for tensor in kept if tensor is not None)
        states = sum(tensor.numel() for tensor in kept_states(model, cache))
        with FlopCounterMode(display=False) as counter:
            model(ids[:, length:], past_key_values=cache, use_cache=True)
    return size, counter.get_total_flops(), states


@pytest.mark.parametrize("find", [wrong_parameters, wrong_step])
def test_families_with_parts_of_their_own(find):
    here = [name for name in BY_DAY if hasattr(transformers, name)]
    found = {name: find(name) for name in here}
    assert [wrong for wrong in found.values() if wrong] == []
    assert sum(wrong is not None for wrong in found.values()) >= len(here) - 1  # Recurrent Gemma keeps its own cache


@pytest.mark.nightly
@pytest.mark.parametrize("find", [wrong_parameters, wrong_step])
def test_every_family(find):
    names = sorted({*tiny_models.names(), *MULTIMODAL.values()})
    found = {name: find(name) for name in names}
    assert [wrong for wrong in found.values() if wrong] == []
    assert sum(wrong is not None for wrong in found.values()) > 100
