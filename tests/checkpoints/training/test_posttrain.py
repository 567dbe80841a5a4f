"""`post_train` against a loop written out by hand."""

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from parscale import wrap
from parscale.checkpoints.training import posttrain
from parscale.checkpoints.training.posttrain import Recipe, post_train

BLOCKS = np.random.default_rng(0).integers(0, 64, (4, 12))


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return wrap(LlamaForCausalLM(config), 2, prefix_length=3, init="random", seed=0)


def is_of_streams(name):
    return "prefix_" in name or "aggregate_layer" in name


def test_takes_the_steps_of_a_loop_by_hand(model):
    """All blocks in each step, so that their order does not matter; two warm-up steps of five."""
    by_hand = copy.deepcopy(model).train()
    recipe = Recipe(5 * 48, 4, streams_learning_rate=1e-2, backbone_learning_rate=1e-3, warmup=0.4)
    result = post_train(model, BLOCKS, recipe)

    named = dict(by_hand.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p for name, p in named.items() if is_of_streams(name) is which]} for which in (True, False)],
        betas=(0.9, 0.99),
        weight_decay=0.0,
    )
    losses = []
    for factor in (0.5, 1.0, 1.0, 2 / 3, 1 / 3):
        for group, rate in zip(optimizer.param_groups, (1e-2, 1e-3), strict=True):
            group["lr"] = rate * factor
        loss = by_hand(input_ids=torch.from_numpy(BLOCKS), labels=torch.from_numpy(BLOCKS)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert result.losses == pytest.approx(losses, abs=1e-5)
    assert result.tokens == 5 * 48
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, named[name], atol=1e-4, rtol=1e-3, msg=name)


def test_a_frozen_backbone_stays_and_streams_move(model):
    before = copy.deepcopy(model.state_dict())
    model.freeze_backbone()
    post_train(model, BLOCKS, Recipe(3 * 24, 2))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) is not is_of_streams(name), name


@pytest.mark.parametrize("bf16", [False, True])
def test_the_model_computes_as_before_afterwards(model, bf16):
    """Autocast ends with the training: the logits are those of a model that was never trained here, to the last bit."""
    untrained = copy.deepcopy(model).eval()
    post_train(model, BLOCKS, Recipe(2 * 24, 2), bf16=bf16)
    untrained.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(torch.from_numpy(BLOCKS)).logits, untrained(torch.from_numpy(BLOCKS)).logits)


def test_ends_by_the_clock_with_a_learning_rate_of_zero(model, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(posttrain.time, "perf_counter", lambda: float(next(clock)))
    shares = []
    result = post_train(model, BLOCKS, Recipe(1000 * 24, 2, seconds=40.0), on_step=shares.append)
    assert 1 < len(result.losses) < 40
    assert result.tokens == 24 * len(result.losses)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_the_order_is_the_seed_s(model):
    runs = [post_train(copy.deepcopy(model), BLOCKS, Recipe(8 * 12, 1, seed=seed)).losses for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("recipe", [Recipe(tokens=23, batch_size=2), Recipe(tokens=10_000, batch_size=5)])
def test_too_little_text_is_named(model, recipe):
    with pytest.raises(ValueError, match=r"A step takes \d blocks of 12 tokens"):
        post_train(model, BLOCKS, recipe)
