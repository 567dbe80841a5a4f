"""Streams that run where stream 0's prediction is uncertain only."""

import math

import pytest
import torch
from model_calls import GREEDY, given
from transformers import DynamicCache, LogitsProcessor

from parscale.methods import adaptive_streams

TOLERANCE = 2e-5
STEPS = 6
NIGHTLY = [pytest.param(name, marks=pytest.mark.nightly) for name in ("mistral", "mixtral")]
NAMES = ["llama", "gemma2", "gpt2", "deepseek_v3", "gpt_oss", *NIGHTLY]
PADDING = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])


def make(zoo, name):
    family = zoo.FAMILIES[name]
    return zoo.share(zoo.Case(family, family.attention[-1]).plain())


@pytest.fixture
def llama(zoo):
    return make(zoo, "llama")


def generate(model, ids, **arguments):
    options = GREEDY | {"max_new_tokens": STEPS, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(ids, **{"attention_mask": PADDING} | options | arguments)


@torch.no_grad()
def logits_of(model, ids, streams="default", **arguments):
    with model.use_streams(streams):
        return model(ids, **arguments).logits


def entropy_of(logits):
    probabilities = logits.double().softmax(-1)
    return -(probabilities * probabilities.log()).sum(-1)


def by_hand(model, ids, threshold, steps=STEPS):
    """Greedy decoding without a cache, each token by two models: the text, its logits, and the mean of the streams."""
    positions, padding, ran, logits = PADDING, PADDING, 0, []
    for _ in range(steps):
        options = {"attention_mask": padding, "position_ids": (padding.cumsum(-1) - 1).clamp(min=0), "use_cache": False}
        alone, mixed = (logits_of(model, ids, chosen, **options)[:, -1] for chosen in (None, "default"))
        uncertain = entropy_of(alone) > threshold
        ran += int(uncertain.sum())
        logits.append(torch.where(uncertain[:, None], mixed, alone))
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
        padding = torch.cat([padding, torch.ones_like(positions[:, :1])], 1)
    return ids, torch.stack(logits), 1 + (model.num_streams - 1) * ran / (steps * len(ids))


def between(model, ids):
    """A threshold that some tokens are above, and others below."""
    return float(entropy_of(logits_of(model, ids, None)).median())


@pytest.mark.grid
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_text_and_share(name, cache, zoo):
    model, ids = make(zoo, name), zoo.token_ids() * PADDING
    options = {"attention_mask": PADDING, "position_ids": (PADDING.cumsum(-1) - 1).clamp(min=0)}
    first = entropy_of(logits_of(model, ids, None, **options)[:, -1])
    threshold = float(first.mean())  # of two rows one is above it, at least at first
    arguments = {"static": {"cache_implementation": "static"}, "none": {"use_cache": False}}.get(cache, {})
    output = generate(model, ids, adaptive=threshold, **arguments)
    text, logits, mean = by_hand(model, ids, threshold)
    assert torch.equal(output.sequences, text)
    zoo.close(torch.stack(output.logits), logits, TOLERANCE)
    assert 1 < mean < zoo.P  # or it would show nothing
    assert model.last_mean_streams == pytest.approx(mean)


def test_zero_is_all_streams_to_the_last_bit(llama, zoo):
    ids = zoo.token_ids() * PADDING
    found, expected = generate(llama, ids, adaptive=0), generate(llama, ids)
    assert all(torch.equal(x, y) for x, y in zip(found.logits, expected.logits, strict=True))
    assert llama.last_mean_streams == zoo.P


def test_infinity_is_the_plain_backbone_to_the_last_bit(llama, zoo):
    ids = zoo.token_ids() * PADDING
    found = generate(llama, ids, adaptive=math.inf)
    expected = generate(zoo.Case(zoo.FAMILIES["llama"], "sdpa").plain(), ids)
    assert all(torch.equal(x, y) for x, y in zip(found.logits, expected.logits, strict=True))
    assert llama.last_mean_streams == 1


@pytest.mark.parametrize("disabled", [True, False])
def test_the_callers_own_word_on_compilation(llama, disabled, zoo):
    """Streams on chosen tokens are not compiled, whatever is said of it."""
    ids = zoo.token_ids() * PADDING
    found = generate(llama, ids, adaptive=1.0, disable_compile=disabled)
    assert torch.equal(found.sequences, generate(llama, ids, adaptive=1.0).sequences)


@pytest.mark.parametrize("adaptive", [None, 0, 1.0])
def test_a_draft_from_inner_states_is_refused(llama, adaptive, zoo):
    with pytest.raises(ValueError, match="'dflash' drafts from the hidden states of inner layers"):
        generate(llama, zoo.token_ids(), adaptive=adaptive, speculation_type="dflash")


def test_attention_weights_of_drafted_tokens(llama, zoo):
    """They keep the columns of the prefix, as without `adaptive`."""
    llama.set_attn_implementation("eager")
    options = {"attention_mask": None, "output_attentions": True, "assistant_model": make(zoo, "llama")}
    found = generate(llama, zoo.token_ids(rows=1), adaptive=0, **options).attentions
    assert [step[0].shape[-1] for step in found] == [zoo.T + zoo.S + step for step in range(STEPS)]


def test_what_nobody_is_above_is_the_plain_backbone(llama, zoo):
    """By its own way: stream 0 runs first, and nothing follows."""
    ids = zoo.token_ids() * PADDING
    found = generate(llama, ids, adaptive=math.log(zoo.VOCABULARY) + 1)
    expected = generate(zoo.Case(zoo.FAMILIES["llama"], "sdpa").plain(), ids)
    assert all(torch.equal(x, y) for x, y in zip(found.logits, expected.logits, strict=True))
    assert llama.last_mean_streams == 1


def test_beams(llama, zoo):
    """Each row of each beam decides for itself; the best text by its own score."""
    ids, threshold = zoo.token_ids() * PADDING, between(llama, zoo.token_ids())
    output = generate(llama, ids, adaptive=threshold, num_beams=3, num_return_sequences=3, output_scores=True)
    without = generate(llama, ids, adaptive=threshold, num_beams=3, num_return_sequences=3, use_cache=False)
    assert torch.equal(output.sequences, without.sequences)


def test_only_uncertain_rows_run(llama, zoo):
    shapes, ids = [], zoo.token_ids()
    alone = entropy_of(logits_of(llama, ids, None)[:, -1])
    llama.model.layers[0].register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    generate(llama, ids, adaptive=float(alone.mean()), max_new_tokens=1, attention_mask=torch.ones_like(ids))
    assert shapes == [(zoo.B, zoo.S), (zoo.P - 1, 1)]  # one of two rows is above the mean


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_all_positions_at_once(attention, zoo):
    """As in evaluation: one call, and each position as if it were the only one."""
    model, ids = make(zoo, "llama"), zoo.token_ids()
    alone, mixed = (logits_of(model, ids, chosen) for chosen in (None, "default"))
    threshold = between(model, ids)
    uncertain = entropy_of(alone) > threshold
    model.set_attn_implementation(attention)
    stance = torch.compiler.set_stance("force_eager")
    with adaptive_streams(model, threshold) as adaptive, torch.no_grad(), stance:
        found = model(ids, use_cache=False).logits
    zoo.close(found, torch.where(uncertain[..., None], mixed, alone), TOLERANCE)
    assert torch.equal(adaptive.chosen, uncertain)
    assert adaptive.mean_streams == pytest.approx(1 + (zoo.P - 1) * float(uncertain.double().mean()))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_some_uncertain_rows(attention, llama, zoo):
    """Streams run on those alone, or on all rows where a mask cannot be cut to some."""
    ids, mask = zoo.token_ids(3), torch.cat([PADDING, PADDING[:1]])
    options = {"attention_mask": mask, "logits_to_keep": 1, "use_cache": False}
    alone, mixed = (logits_of(llama, ids, chosen, **options) for chosen in (None, "default"))
    entropy = entropy_of(alone)
    uncertain = entropy > entropy.mean()
    expected = torch.where(uncertain[..., None], mixed, alone)
    llama.set_attn_implementation(attention)
    stance = torch.compiler.set_stance("force_eager")
    with adaptive_streams(llama, float(entropy.mean())) as adaptive, stance:
        for found in (llama(ids, **options).logits, llama(ids, return_dict=False, **options)[0]):
            zoo.close(found, expected, TOLERANCE)
    assert 0 < adaptive.ran == 2 * uncertain.sum() < 2 * len(ids)  # in two calls


def test_pieces_of_a_text(llama, zoo):
    ids, cache, threshold = zoo.token_ids(), DynamicCache(config=llama.config), between(llama, zoo.token_ids())
    alone, mixed = (logits_of(llama, ids, chosen) for chosen in (None, "default"))
    expected = torch.where((entropy_of(alone) > threshold)[..., None], mixed, alone)
    with adaptive_streams(llama, threshold), torch.no_grad():
        for start, stop in ((0, 4), (4, 5), (5, 9)):
            found = llama(ids[:, start:stop], **given(llama, cache)).logits
            zoo.close(found, expected[:, start:stop], TOLERANCE)


def test_a_configuration_that_asks_for_router_logits_costs_no_pass(zoo):
    """As training with the load-balancing loss leaves it; generate returns none of them."""
    model, ids, shapes = make(zoo, "mixtral"), zoo.token_ids(), []
    threshold = between(model, ids)
    expected = generate(model, ids, adaptive=threshold, attention_mask=None).sequences
    model.config.output_router_logits = True
    assert torch.equal(generate(model, ids, adaptive=threshold, attention_mask=None).sequences, expected)
    model.model.layers[0].register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape[:2])))
    generate(model, ids, max_new_tokens=1, attention_mask=None, assistant_model=None)
    assert shapes == [(zoo.B, zoo.S), ((zoo.P - 1) * zoo.B, 1)]
    with pytest.raises(ValueError, match=r"logits \(output_router_logits=True\): pass output_router_logits=False"):
        generate(model, ids, adaptive=threshold, output_router_logits=True)
    with adaptive_streams(model, threshold), torch.no_grad():
        with pytest.raises(ValueError, match=r"\(config\.output_router_logits is True\): pass output_router"):
            model(ids)
        assert model(ids, output_router_logits=False).router_logits is None


class ChooseWide(LogitsProcessor):
    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, scores):
        self.model.set_streams("wide")
        return scores


@pytest.mark.parametrize("adaptive", [None, 1.0])
def test_a_set_that_is_chosen_meanwhile_stays(llama, adaptive, zoo):
    llama.add_streams("wide", 2, prefix_length=3, init="random", kv="shared")
    generate(llama, zoo.token_ids(), adaptive=adaptive, max_new_tokens=1, logits_processor=[ChooseWide(llama)])
    assert llama.parscale.active.name == "wide"


# -- what is refused


@torch.no_grad()
def test_a_pass_that_failed_leaves_the_backbone_as_it_was(llama, zoo):
    """The first of two, of the last token alone."""
    ids = zoo.token_ids()
    expected = llama.model(ids)[0]

    def fail(*_):
        raise RuntimeError("half-way")

    hook = llama.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="half-way"):
        llama(ids, logits_to_keep=1)
    hook.remove()
    assert torch.equal(llama.model(ids)[0], expected)


@pytest.mark.parametrize("threshold", [-0.1, math.nan, "1", True])
def test_what_is_no_entropy_is_refused(threshold, llama, zoo):
    with pytest.raises(ValueError, match=r"adaptive must be an entropy in nats, 0 .* to infinity"):
        llama.generate(zoo.token_ids(), adaptive=threshold)


def test_streams_with_keys_of_their_own_cannot_adapt(wrapped, zoo):
    with pytest.raises(ValueError, match=r"share keys and values, but 'default' is P = 4, own.*kv='shared'"):
        wrapped.generate(zoo.token_ids(), adaptive=1.0)
    with wrapped.use_streams(None), pytest.raises(ValueError, match="none are active"):
        wrapped.generate(zoo.token_ids(), adaptive=1.0)


def test_gradients_and_labels_are_refused(llama, zoo):
    ids = zoo.token_ids()
    with adaptive_streams(llama, 1.0):
        with pytest.raises(ValueError, match="records gradients"):
            llama(ids)
        with pytest.raises(ValueError, match="has labels"), torch.no_grad():
            llama(ids, labels=ids)
    llama(ids, labels=ids).loss.backward()  # outside of it as ever


@pytest.mark.parametrize("wanted", ["output_hidden_states", "output_attentions"])
def test_states_of_other_streams_than_the_logits_are_refused(llama, zoo, wanted):
    with pytest.raises(ValueError, match="asks for hidden states, attentions or router logits"):
        llama.generate(zoo.token_ids(), adaptive=1.0, max_new_tokens=2, return_dict_in_generate=True, **{wanted: True})
