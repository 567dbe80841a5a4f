"""Streams that share keys and values on a quantized backbone: the cache is still the backbone's."""

import pytest
import torch
from model_calls import generate, logits_of
from transformers import BitsAndBytesConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, QuantoConfig

TOLERANCE = 2e-5


def int8():
    pytest.importorskip("optimum.quanto")
    return QuantoConfig(weights="int8")


def nf4():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A backbone whose layers both libraries can quantize."""
    folder = tmp_path_factory.mktemp("plain") / "backbone"
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)
    return folder


@pytest.fixture(params=[int8, nf4], ids=lambda config: config.__name__)
def backbone(folder, request):
    """Loads the backbone, quantized."""
    options = {"dtype": torch.float32, "device_map": {"": "cpu"}, "quantization_config": request.param()}
    return lambda: LlamaForCausalLM.from_pretrained(folder, **options)


def test_the_cache_is_the_backbones_and_steps_go_on_from_it(backbone, zoo):
    plain, model, ids = backbone(), zoo.share(backbone()), zoo.token_ids()
    assert len(model.parscale.key_projections) == 4  # of keys and of values in two layers
    caches, whole = [DynamicCache(config=plain.config) for _ in range(2)], logits_of(model, ids)
    for each, cache in zip((plain, model), caches, strict=True):
        kept = logits_of(each, ids[:, :7], cache=cache, logits_to_keep=1)
    for theirs, mine in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(theirs.keys, mine.keys)
        assert torch.equal(theirs.values, mine.values)
    zoo.close(kept, whole[:, 6:7], TOLERANCE)
    for at in (7, 8):
        zoo.close(logits_of(model, ids[:, at : at + 1], cache=caches[1]), whole[:, at : at + 1], TOLERANCE)
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))


def test_the_streams_learn(backbone, zoo):
    model, ids = zoo.share(backbone()), zoo.token_ids()
    model.freeze_backbone()
    model(ids, labels=ids).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 + 4  # keys and values of two layers, and the aggregator
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in trained)
