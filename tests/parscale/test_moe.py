"""Mixtures of experts: every stream routes for itself, and the balancing loss counts the tokens of all streams."""

import pytest
import torch

import parscale

MOE = ["qwen3_moe", "mixtral", "gpt_oss", "qwen3_next"]
only_moe = pytest.mark.parametrize("family", MOE, indirect=True)
TOLERANCE = 2e-5  # as in test_families.py


def routers(model):
    return [module for module in model.modules() if "Router" in type(module).__name__]


def balancing_loss(router_logits, k, keep):
    """Switch Transformer's equations 4 to 6 over the tokens of all layers together, as transformers sums them.

    Args:
        router_logits: of each layer, `(tokens, E)`.
        k: experts for each token.
        keep: which tokens count, `(tokens,)`.
    """
    logits = torch.cat([layer.double()[keep] for layer in router_logits])
    probabilities = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    chosen = probabilities.argsort(dim=-1, descending=True)[:, :k]
    E = logits.shape[1]
    total = 0.0
    for rank in range(k):
        for expert in range(E):
            share = (chosen[:, rank] == expert).double().mean()
            total += E * share * probabilities[:, expert].mean()
    return total


@only_moe
def test_router_logits_are_each_streams_own(family, zoo):
    model, ids = family.wrapped(), zoo.token_ids()
    with torch.no_grad():
        output = model(input_ids=ids, output_router_logits=True)
    assert {tuple(logits.shape) for logits in output.router_logits} == {(zoo.P * zoo.B * zoo.S, 4)}
    reference = family.reference(model)
    for p in range(zoo.P):
        seen = []
        handles = [
            router.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output[0]))
            for router in routers(reference.plain)
        ]
        reference.hidden(p, ids)
        for handle in handles:
            handle.remove()
        assert len(seen) == len(output.router_logits)
        for logits, expected in zip(output.router_logits, seen, strict=True):
            zoo.close(logits.unflatten(0, (zoo.P, -1))[p], expected.flatten(0, -2), TOLERANCE)


@only_moe
def test_router_logits_in_a_tuple_and_of_a_backbone_alone(family, zoo):
    model, ids = family.wrapped(), zoo.token_ids()
    backbone = family.plain().base_model
    parscale.wrap(backbone, zoo.P, prefix_length=zoo.T, init="random")
    zoo.fill_streams(backbone)
    with torch.no_grad():
        expected = model(input_ids=ids, output_router_logits=True).router_logits
        for each in (model, backbone):
            in_tuple = each(input_ids=ids, output_router_logits=True, return_dict=False)[-1]
            for found in (in_tuple, each(input_ids=ids, output_router_logits=True).router_logits):
                for logits, own in zip(found, expected, strict=True):
                    zoo.close(logits, own, TOLERANCE)


@torch.no_grad()
def test_router_logits_of_the_plain_model_after_the_backbone_alone(zoo):
    case, ids = zoo.Case(zoo.FAMILIES["mixtral"], "sdpa"), zoo.token_ids()
    model, expected = case.wrapped(), case.plain()(ids, output_router_logits=True).router_logits
    model.model(ids, output_router_logits=True)
    with model.use_streams(None):
        found = model(ids, output_router_logits=True).router_logits
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_other_matrices_in_a_tuple_stay(zoo):
    """A tuple has no names, and its matrices need not be a router's."""
    model, ids = zoo.Case(zoo.FAMILIES["qwen3_moe"]).wrapped(), zoo.token_ids()
    others = tuple(torch.randn(3, 2) for _ in range(zoo.P))

    class WithOthers(type(model)):
        def forward(self, *args, **kwargs):
            return (*super().forward(*args, **kwargs), others)

    model.__class__ = WithOthers
    with torch.no_grad():
        for wanted in (False, True):
            output = model(input_ids=ids, output_router_logits=wanted, return_dict=False)
            assert output[-1] is others
    assert {tuple(logits.shape) for logits in output[-2]} == {(zoo.P * zoo.B * zoo.S, 4)}


@pytest.mark.grid
@only_moe
@pytest.mark.parametrize("padding", ["none", "all ones", "left", "right"])
def test_the_balancing_loss_counts_real_tokens_of_all_streams(family, zoo, padding):
    model, ids = family.wrapped(), zoo.token_ids()
    mask = torch.ones_like(ids)
    if padding in ("left", "right"):
        (mask[1, :4] if padding == "left" else mask[1, 5:]).zero_()
    arguments = {} if padding == "none" else {"attention_mask": mask}
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        without = model(input_ids=ids, labels=labels, **arguments)
        output = model(input_ids=ids, labels=labels, output_router_logits=True, **arguments)
    keep = mask.flatten().bool().repeat(zoo.P)
    expected = balancing_loss(output.router_logits, model.config.num_experts_per_tok, keep)
    zoo.close(output.aux_loss, expected, 1e-5)
    zoo.close(output.loss, without.loss + model.config.router_aux_loss_coef * expected, 1e-5)
    if padding in ("left", "right"):  # and the mask matters
        everything = balancing_loss(output.router_logits, model.config.num_experts_per_tok, torch.ones_like(keep))
        assert abs(everything - expected) > 1e-4


@only_moe
def test_the_balancing_loss_trains_the_prefixes(family, zoo):
    model, ids = family.wrapped().train(), zoo.token_ids()
    model.config.output_router_logits = True
    output = model(input_ids=ids, labels=ids)
    output.aux_loss.backward()
    later = model.config.num_hidden_layers - 1  # whose prefix no router comes after
    for name, parameter in model.named_parameters():
        if "prefix_" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.any() or f".{later}." in name


@only_moe
def test_the_backbones_own_class_reads_its_experts(family, tmp_path):
    """From a full checkpoint, where they are stored one by one under the checkpoint's own type."""
    model = family.wrapped()
    model.save_pretrained(tmp_path)
    found = type(model).from_pretrained(tmp_path).state_dict()
    for name, tensor in family.plain().state_dict().items():
        assert torch.equal(found[name], tensor), name
