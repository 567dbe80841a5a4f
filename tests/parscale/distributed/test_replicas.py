"""Replicas as `nn.DataParallel` makes them: the Trainer puts it around a model on several GPUs without a launcher.

torch copies tensors to devices with CUDA only, so here the two functions that do are replaced by copies on the CPU;
everything else of `torch.nn.parallel.replicate` is its own. Each replica runs in a thread of its own, as there.
"""

import functools
import sys

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import parscale

IDS = torch.arange(3, 19).reshape(2, 8)
TOKENS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GEMMA3N = TOKENS | SIZES | {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8}
MODELS = {
    "llama": (AutoModelForCausalLM, transformers.LlamaConfig(**TOKENS, **SIZES)),
    "bloom": (AutoModelForCausalLM, transformers.BloomConfig(**TOKENS, hidden_size=32, n_layer=2, n_head=4)),
    "gpt_neo": (
        AutoModelForCausalLM,
        transformers.GPTNeoConfig(
            **TOKENS,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=3,
            max_position_embeddings=64,
        ),
    ),
    "gemma3n, whose last layers borrow keys": (
        AutoModelForCausalLM,
        transformers.Gemma3nTextConfig(
            **GEMMA3N,
            vocab_size_per_layer_input=96,
            hidden_size_per_layer_input=8,
            laurel_rank=4,
            num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            sliding_window=4,
            activation_sparsity_pattern=[0.0] * 4,
        ),
    ),
    "bert, which pools": (AutoModel, transformers.BertConfig(**TOKENS, **SIZES)),
    "t5": (
        AutoModelForSeq2SeqLM,
        transformers.T5Config(
            vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
    ),
}


def make(kind="llama", transform="prefix"):
    factory, config = MODELS[kind]
    torch.manual_seed(0)
    model = factory.from_config(config).eval()
    parscale.wrap(model, 3, prefix_length=4, init="random", seed=0, transform=transform)
    model.add_streams("two", 2, prefix_length=3, init="random", seed=1, transform=transform)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("prefix_", "prompt", "stream_up", "aggregate_layer")):
                parameter.normal_(0, 0.3)
    return model


@pytest.fixture
def replicate(monkeypatch):
    module = sys.modules["torch.nn.parallel.replicate"]

    def on_the_cpu(tensors, devices, detach=False):
        return [[tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", on_the_cpu)
    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    return module.replicate


def inputs(model):
    labels = {"labels": IDS} if model.can_generate() else {}
    return {"input_ids": IDS} | labels


def states(output):
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def scalar(output):
    return output.loss if getattr(output, "loss", None) is not None else output[0].square().sum()


@pytest.mark.parametrize(
    ("kind", "transform"),
    [(kind, "prefix") for kind in MODELS] + [("llama", "prompt"), ("llama", "lora"), ("t5", "lora")],
)
def test_a_replica_has_the_streams_and_gives_its_gradients_to_the_model(kind, transform, replicate, at_once):
    model = make(kind, transform)
    model.freeze_backbone()
    expected = model(**inputs(model))
    scalar(expected).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(model.parscale.tensors(model.parscale.active))
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
    model.zero_grad()

    replicas = replicate(model, [0, 1])
    results = at_once(*(functools.partial(replica, **inputs(model)) for replica in replicas))
    for result in results:
        assert torch.equal(states(result), states(expected))
        assert torch.equal(scalar(result), scalar(expected))
    sum(map(scalar, results)).backward()
    for name, parameter in model.named_parameters():
        if name in gradients:  # of two replicas on the same rows
            assert torch.allclose(parameter.grad, 2 * gradients[name], rtol=1e-4, atol=1e-6), name


def test_replicas_read_no_tensor_of_the_model(replicate, at_once):
    """The model's own tensors lie on the first device: if the others' replicas read them, they fail."""
    for kind in MODELS:
        model = make(kind)
        expected = states(model(**inputs(model))).clone()
        replica = replicate(model, [0, 1])[1]
        with torch.no_grad():
            for parameter in (*model.parameters(), *model.buffers()):
                if parameter.is_floating_point():
                    parameter.fill_(float("nan"))
        (result,) = at_once(functools.partial(replica, **inputs(model)))
        assert torch.equal(states(result), expected), kind


def test_replicas_run_the_set_of_the_block_that_made_them(replicate, at_once):
    model = make()
    for name in ("two", None, "default"):
        with model.use_streams(name):
            expected = model(IDS).logits
            replicas = replicate(model, [0, 1])
        for result in at_once(*(functools.partial(replica, IDS) for replica in replicas)):
            assert torch.equal(result.logits, expected), name


def test_layers_that_are_recomputed_in_a_replica(replicate, at_once):
    model = make()
    model.freeze_backbone()
    model.train()
    model(IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        (result,) = at_once(functools.partial(replicate(model, [0, 1])[1], IDS, labels=IDS))
        with model.use_streams("two"):
            result.loss.backward()
        for name, gradient in gradients.items():
            parameter = model.get_parameter(name)
            assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-7), name
        model.zero_grad()


def test_an_unwrapped_model_is_replicated_by_torch_alone(replicate):
    model = parscale.unwrap(make())
    assert "_replicate_for_data_parallel" not in vars(model.model)
    replica = replicate(model, [0, 1])[1]
    assert torch.equal(replica(IDS).logits, model(IDS).logits)
