"""What `docs/architectures.md` says of each architecture is still so, and it knows each that transformers has."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import transformers
from scripts import load_script

import parscale

ROOT = Path(__file__).parents[1]
RECORDED = json.loads((ROOT / "benchmarks" / "results" / "support.json").read_text())
CLASSES = RECORDED["classes"]
PINNED = transformers.__version__ == RECORDED["versions"]["transformers"]


tiny_models, promises, support = map(load_script, ("tiny_models", "promises", "support"))
HERE = sorted(set(CLASSES) & set(tiny_models.names()))  # another transformers has others
ALWAYS = {"BloomForCausalLM", "LlamaForCausalLM"}


def cases():
    """Every class with every transform; but for `ALWAYS` and the first with each answer, they are for the night."""
    answers = set()
    for name, transform in itertools.product(HERE, promises.TRANSFORMS):
        if transform not in CLASSES[name]:
            continue
        recorded = CLASSES[name][transform]
        answer = (transform, recorded["verdict"], *recorded.get("without", []), recorded.get("context"))
        marks = [] if name in ALWAYS or answer not in answers else [pytest.mark.nightly]
        answers.add(answer)
        yield pytest.param(name, transform, marks=marks, id=f"{name}-{transform}")


@pytest.mark.parametrize(("name", "transform"), cases())
def test_a_class_keeps_its_verdict(name, transform):
    recorded, found = CLASSES[name][transform], promises.examine(name, transform)
    if recorded["verdict"] == promises.SUPPORTED:
        assert found.verdict == promises.SUPPORTED, found.reason
    if PINNED and recorded["verdict"] != promises.NOT_BUILT:
        stale = "make the table again: python benchmarks/support.py --output docs/architectures.md"
        assert found.verdict == recorded["verdict"], stale
        assert found.without == recorded.get("without", []), stale
        assert found.context == recorded.get("context", ""), stale


@pytest.mark.skipif(not PINNED, reason="the table is of another transformers")
def test_the_table_has_every_class():
    assert sorted(CLASSES) == tiny_models.names()
    assert (ROOT / "docs" / "architectures.md").read_text() == support.page(RECORDED)


def switched_off(model):
    model.set_streams(None)


def frozen(model):
    next(parameter for name, parameter in model.named_parameters() if "prefix_v" in name).requires_grad_(False)


def hidden(model):
    """No token sees the first of a layer's prefix."""
    values = next(parameter for name, parameter in model.named_parameters() if "prefix_v" in name)
    values.register_hook(lambda gradient: gradient.index_fill(2, torch.tensor([0]), 0.0))


def forgetful(model):
    """Other logits for a token that comes alone."""
    model.lm_head.register_forward_hook(lambda module, args, output: output * (1.0 + 1e-4 * (output.shape[1] == 1)))


def unsaved(model):
    """A part of what it computes is in no file."""
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.001)


@pytest.mark.parametrize(
    ("breaking", "reason"),
    [
        (switched_off, "streams change the logits by 0e+00 only"),
        (frozen, "prefix_v has no gradient"),
        (hidden, "the last token does not see all of model.layers.0.self_attn.prefix_v"),
        (forgetful, "in pieces, with a cache"),
        (unsaved, "after saving and loading"),
    ],
)
def test_a_broken_promise_is_seen(breaking, reason, monkeypatch):
    def wrap(model, num_streams, **options):
        own_wrap(model, num_streams, **options)
        if num_streams > 1:
            breaking(model)
        return model

    own_wrap = parscale.wrap
    monkeypatch.setattr(parscale, "wrap", wrap)
    found = promises.examine("LlamaForCausalLM")
    assert found.verdict == promises.NOT
    assert reason in found.reason
