"""`generate` in all its ways, against loops by hand that run the whole text anew for every token, with no cache."""

import itertools

import pytest
import torch
import transformers
from model_calls import GREEDY, STEPS, generate
from packaging.version import Version
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import parscale

# dense, grouped queries, sliding windows, learned positions, experts, latent attention, sinks, a hybrid
NIGHTLY = [pytest.param(name, marks=pytest.mark.nightly) for name in ("mistral", "opt", "mixtral")]
NAMES = ["llama", "gemma3", "gpt2", "deepseek_v3", "gpt_oss", "qwen3_next", *NIGHTLY]


def make(zoo, name, **changes):
    family = zoo.FAMILIES[name]
    model = zoo.Case(family, family.attention[-1]).wrapped(**changes)
    model.generation_config.eos_token_id = None  # no text ends before its time
    with torch.no_grad():  # nor is the same token always the best: the head does not see the mean hidden state
        head = model.get_output_embeddings().weight
        mean = model.get_decoder()(zoo.token_ids(rows=8, length=20))[0].mean((0, 1))
        head.sub_(torch.outer(head @ mean, mean / mean.square().sum())).mul_(2)
    return model


@pytest.fixture
def llama(zoo):
    return make(zoo, "llama")


@torch.no_grad()
def next_logits(model, ids):
    """Of the token after each row, `(rows, vocabulary)`."""
    return model(ids, use_cache=False).logits[:, -1]


def greedy(model, ids, steps=STEPS, change=lambda ids, logits: logits):
    """By hand; the two best tokens are far enough apart for no rounding to swap them."""
    for _ in range(steps):
        logits = change(ids, next_logits(model, ids))
        best = logits.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-4
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("name", NAMES)
def test_greedy(name, zoo):
    model, ids = make(zoo, name), zoo.token_ids()
    expected = greedy(model, ids)
    assert len(expected[:, zoo.S :].unique()) > 5
    assert torch.equal(generate(model, ids), expected)
    assert torch.equal(generate(model, ids, use_cache=False), expected)
    with model.use_streams(None):  # and the streams have a say
        assert not torch.equal(generate(model, ids), expected)


@pytest.mark.parametrize("name", NAMES)
def test_left_padding(name, zoo):
    """A batch of different lengths gives what each row gives by itself."""
    model, ids, lengths = make(zoo, name), zoo.token_ids(rows=3), [9, 4, 1]
    padding = torch.stack([torch.arange(9) >= 9 - n for n in lengths]).long()
    generated = generate(model, ids * padding, padding)
    for row, n in enumerate(lengths):
        assert torch.equal(generated[row : row + 1, 9 - n :], greedy(model, ids[row : row + 1, 9 - n :]))


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_next"])
def test_sampling(name, zoo):
    model, ids = make(zoo, name), zoo.token_ids()
    arguments = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 1.0}
    torch.manual_seed(3)
    by_hand = ids.repeat_interleave(2, dim=0)
    for _ in range(STEPS):
        logits = next_logits(model, by_hand) / 0.7
        logits = logits.masked_fill(logits < logits.topk(20).values[:, -1:], -torch.inf)
        by_hand = torch.cat([by_hand, torch.multinomial(logits.softmax(-1), 1)], dim=1)
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(3)
        assert torch.equal(generate(model, ids, num_return_sequences=2, **arguments, **cache), by_hand)


def beams_by_hand(model, ids, beams, steps=STEPS):
    """The best `beams` continuations of one row `(1, n)`, best first: at each step the best ones of all."""
    texts, scores = ids, torch.zeros(1)
    for _ in range(steps):
        candidates = scores[:, None] + next_logits(model, texts).float().log_softmax(-1)  # (texts, vocabulary)
        scores, best = candidates.flatten().topk(beams)
        texts = torch.cat([texts[best // candidates.shape[1]], (best % candidates.shape[1])[:, None]], dim=1)
    return texts


@pytest.mark.parametrize("name", NAMES)
def test_beams(name, zoo):
    model, ids = make(zoo, name), zoo.token_ids()
    generated = generate(model, ids, num_beams=3, num_return_sequences=2)
    expected = torch.cat([beams_by_hand(model, row[None], 3)[:2] for row in ids])
    assert torch.equal(generated, expected)
    assert not torch.equal(generated[::2], generate(model, ids))  # more than a greedy search


def test_beams_with_padding(llama, zoo):
    ids = zoo.token_ids()
    padding = torch.tensor([[1] * 9, [0] * 5 + [1] * 4])
    generated = generate(llama, ids * padding, padding, num_beams=4, num_return_sequences=1)
    assert torch.equal(generated[:1], beams_by_hand(llama, ids[:1], 4)[:1])
    assert torch.equal(generated[1:, 5:], beams_by_hand(llama, ids[1:, 5:], 4)[:1])


def test_beams_that_sample_are_the_same_without_a_cache(llama, zoo):
    generated = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        arguments = {"num_beams": 3, "do_sample": True, "top_k": 0, "max_new_tokens": 12}
        generated.append(generate(llama, zoo.token_ids(), **arguments, use_cache=use_cache))
    assert torch.equal(*generated)


# -- assisted decoding


@pytest.mark.grid
@pytest.mark.parametrize("draft", ["wrapped", "plain", "prompt"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_assisted_decoding_as_target(name, draft, zoo):
    """The text is the target's own; the draft has another P, or no streams, or is a search in the prompt."""
    if zoo.FAMILIES[name].window and draft != "prompt" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("an older transformers cannot take drafted tokens back from a sliding cache")
    model, ids = make(zoo, name), zoo.token_ids(rows=1)
    expected = greedy(model, ids, steps=12)
    if draft == "prompt":
        arguments = {"prompt_lookup_num_tokens": 3}
    elif draft == "plain":
        arguments = {"assistant_model": parscale.unwrap(make(zoo, name))}
    else:
        arguments = {"assistant_model": make(zoo, name, num_streams=2)}
    assert torch.equal(generate(model, ids, max_new_tokens=12, **arguments), expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_assisted_decoding_as_draft(name, zoo):
    draft, ids = make(zoo, name), zoo.token_ids(rows=1)
    plain = parscale.unwrap(make(zoo, name))
    assert torch.equal(generate(plain, ids, assistant_model=draft), greedy(plain, ids))


def test_a_draft_that_is_right_is_taken(llama, zoo):
    """A copy as its own draft: all of its tokens are accepted, several at a step."""
    ids, draft, lengths = zoo.token_ids(rows=1), make(zoo, "llama"), []
    draft.generation_config.num_assistant_tokens = 5
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    llama.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    generated = generate(llama, ids, assistant_model=draft, max_new_tokens=12)
    assert lengths == [14, 6]  # the prompt and five tokens of the draft; the last token and five more
    assert torch.equal(generated, greedy(parscale_only(llama), ids, steps=12))


def test_a_draft_from_inner_states_is_refused(llama, zoo):
    configuration = transformers.GenerationConfig(max_new_tokens=4)
    configuration.speculation_type = "dflash"
    for arguments in ({"generation_config": configuration}, {"speculation_type": "dflash"}):
        with pytest.raises(ValueError, match=r"'dflash' drafts from .* inner layers.*use an assistant model without"):
            llama.generate(zoo.token_ids(rows=1), **arguments)


@pytest.mark.skipif(not hasattr(transformers, "Gemma4AssistantForCausalLM"), reason="this transformers has no Gemma 4")
def test_a_draft_from_the_keys_is_refused(llama, zoo):
    draft = object.__new__(transformers.Gemma4AssistantForCausalLM)  # transformers 5.23.0 cannot build one
    with pytest.raises(ValueError, match=r"Gemma4AssistantForCausalLM drafts from the keys .*made with kv='shared'"):
        llama.generate(zoo.token_ids(rows=1), assistant_model=draft)


@pytest.mark.skipif(not hasattr(transformers, "MuseGlimmerAssistantModel"), reason="this transformers has no DFlash")
def test_a_draft_from_inner_states_serves_the_backbone(llama, zoo):
    sizes = zoo.COMMON | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.MuseGlimmerAssistantConfig(**sizes, block_size=3, mask_token_id=1, target_layer_ids=[0, 1])
    draft, ids = transformers.MuseGlimmerAssistantModel(config).eval(), zoo.token_ids(rows=1)
    with llama.use_streams(None):
        drafted = generate(llama, ids, assistant_model=draft, speculation_type="dflash")
        assert torch.equal(drafted, greedy(llama, ids))


@pytest.mark.parametrize("changes", [{}, {"kv": "shared"}, {"transform": "prompt"}], ids=["own", "shared", "prompt"])
def test_attention_weights_of_drafted_tokens(changes, zoo):
    """They have all columns, of prefix or prompt and tokens, as without a draft."""
    model, draft = make(zoo, "llama"), make(zoo, "llama")
    for each in (model, draft):
        each.add_streams("other", zoo.P, prefix_length=zoo.T, init="random", seed=0, **changes)
        each.set_streams("other")
    model.set_attn_implementation("eager")
    draft.generation_config.num_assistant_tokens = 5
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    arguments = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_attentions": True}
    alone, drafted = (
        generate(model, zoo.token_ids(rows=1), **arguments, **each) for each in ({}, {"assistant_model": draft})
    )
    assert torch.equal(drafted.sequences, alone.sequences)
    for step, (layers, expected) in enumerate(zip(drafted.attentions, alone.attentions, strict=True)):
        for weights, whole in zip(layers, expected, strict=True):
            assert weights.shape == whole.shape == (zoo.P, 4, zoo.S if step == 0 else 1, zoo.T + zoo.S + step)
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
            if step not in range(1, 6):  # for the first five, transformers takes the rows of other tokens
                torch.testing.assert_close(weights, whole)


def test_attention_weights_that_a_configuration_asks_for(zoo):
    """By position, as `generate(ids, configuration)`: all columns, as when they are asked for by name."""
    model, draft = make(zoo, "llama"), make(zoo, "llama")
    model.set_attn_implementation("eager")
    wanted = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True}
    configuration = transformers.GenerationConfig(**wanted)
    output = model.generate(zoo.token_ids(rows=1), configuration, assistant_model=draft)
    for step, layers in enumerate(output.attentions):
        assert {weights.shape[-1] for weights in layers} == {zoo.T + zoo.S + step}


def parscale_only(model):
    """The model without the hooks that a test has put on it."""
    model._forward_pre_hooks.clear()
    return model


def test_sampling_with_a_draft_is_reproducible(llama, zoo):
    ids, draft, texts = zoo.token_ids(rows=1), make(zoo, "llama", num_streams=2), []
    for _ in range(2):
        torch.manual_seed(0)
        texts.append(generate(llama, ids, do_sample=True, top_k=0, assistant_model=draft, max_new_tokens=12))
    assert torch.equal(*texts)
    assert texts[0].shape == (1, 21)


# -- what goes in and what comes out


def test_embeddings_in_place_of_ids(llama, zoo):
    ids = zoo.token_ids()
    embeddings, padding = llama.get_input_embeddings()(ids), torch.ones_like(ids)
    expected = greedy(llama, ids)
    generated = llama.generate(inputs_embeds=embeddings, attention_mask=padding, **GREEDY)
    assert torch.equal(generated, expected[:, zoo.S :])
    both = llama.generate(ids, inputs_embeds=embeddings, attention_mask=padding, **GREEDY)
    assert torch.equal(both, expected)
    beams = llama.generate(inputs_embeds=embeddings, attention_mask=padding, num_beams=3, **GREEDY)
    assert torch.equal(beams, generate(llama, ids, num_beams=3)[:, zoo.S :])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_scores_hidden_states_and_attention_weights(name, zoo):
    model, ids = make(zoo, name), zoo.token_ids()
    model.set_attn_implementation("eager")
    output = generate(
        model,
        ids,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    assert torch.equal(output.sequences, greedy(model, ids))
    layers, rows = model.config.num_hidden_layers, zoo.P * zoo.B
    for step in range(STEPS):
        text = output.sequences[:, : zoo.S + step]
        with torch.no_grad():
            whole = model(text, output_hidden_states=True, use_cache=False)
        zoo.close(output.logits[step], whole.logits[:, -1], 2e-5)
        zoo.close(output.scores[step], whole.logits[:, -1], 2e-5)
        new = zoo.S if step == 0 else 1
        hidden = output.hidden_states[step]
        assert [h.shape[:2] for h in hidden] == [(rows, new)] * layers + [(zoo.B, new)]
        for own, expected in zip(hidden, whole.hidden_states, strict=True):
            zoo.close(own, expected[:, -new:], 1e-4)  # unnormalised: larger than logits
        for weights in output.attentions[step]:
            assert weights.shape[:3] == (rows, model.config.num_attention_heads, new)
            keys = weights.shape[3] - zoo.T  # a cache may have forgotten those outside a window
            assert keys == text.shape[1] or (name == "gemma3" and keys == model.config.sliding_window)
            torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert output.past_key_values.get_seq_length() == zoo.S + STEPS - 1


def test_beams_with_scores(llama, zoo):
    """Sequence scores are mean log-probabilities; the transitions that `generate` reports add up to them."""
    output = generate(
        llama, zoo.token_ids(), num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True
    )
    log_probabilities = []
    for end in range(zoo.S, zoo.S + STEPS):
        logits = next_logits(llama, output.sequences[:, :end]).log_softmax(-1)
        log_probabilities.append(logits.gather(1, output.sequences[:, end : end + 1]))
    expected = torch.cat(log_probabilities, dim=1)
    zoo.close(output.sequences_scores, expected.mean(-1), 1e-5)
    transitions = llama.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    zoo.close(transitions, expected, 2e-5)


def test_beams_of_a_model_whose_backbone_alone_is_wrapped(zoo):
    """It moves rows of the cache without asking the backbone; greedy tokens are those of the model wrapped whole."""
    whole, ids = make(zoo, "llama"), zoo.token_ids()
    model = zoo.Case(zoo.FAMILIES["llama"]).plain()
    parscale.wrap(model.model, zoo.P, prefix_length=zoo.T, init="random")
    model.load_state_dict(whole.state_dict())
    assert torch.equal(generate(model, ids), generate(whole, ids))
    with pytest.raises(ValueError, match=rf"has {3 * zoo.B} rows, but {3 * zoo.B} rows of input need .*wrap it"):
        generate(model, ids, num_beams=3)


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.pieces, self.ended = [], False

    def put(self, value) -> None:
        self.pieces.append(value.reshape(-1))

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_each_token(llama, zoo):
    streamer, ids = Collector(), zoo.token_ids(rows=1)
    generated = generate(llama, ids, streamer=streamer)
    assert streamer.ended
    assert [len(piece) for piece in streamer.pieces] == [zoo.S] + [1] * STEPS
    assert torch.equal(torch.cat(streamer.pieces), generated[0])


class StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_when_it_stops(llama, zoo):
    ids = zoo.token_ids()
    expected = greedy(llama, ids)
    stopped = generate(llama, ids, stopping_criteria=StoppingCriteriaList([StopAt(12)]))
    assert torch.equal(stopped, expected[:, :12])
    arguments = GREEDY | {"max_new_tokens": None}
    assert torch.equal(generate(llama, ids, **arguments, max_length=11), expected[:, :11])
    # a row that has said its last token is filled up while the other goes on
    end = expected[0, zoo.S + 2]
    said = [(row == end).nonzero() for row in expected[:, zoo.S :]]
    lengths = [zoo.S + (where[0].item() + 1 if len(where) else STEPS) for where in said]
    assert lengths[0] != lengths[1]
    ended = generate(llama, ids, eos_token_id=end.item())
    assert ended.shape == (zoo.B, max(lengths))
    for row, n in enumerate(lengths):
        assert torch.equal(ended[row, :n], expected[row, :n])
        assert ended[row, n:].eq(0).all()


class Forbid(LogitsProcessor):
    def __init__(self, tokens) -> None:
        self.tokens = tokens

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, self.tokens, -torch.inf)


def test_logits_processors(llama, zoo):
    ids = zoo.token_ids()
    forbidden = greedy(llama, ids)[:, zoo.S :].flatten().unique()

    def change(text, logits):
        logits = logits.clone()
        seen = torch.gather(logits, 1, text)
        logits.scatter_(1, text, torch.where(seen < 0, seen * 1.5, seen / 1.5))  # a penalty on what was said before
        return logits.index_fill(1, forbidden, -torch.inf)

    generated = generate(llama, ids, repetition_penalty=1.5, logits_processor=LogitsProcessorList([Forbid(forbidden)]))
    assert torch.equal(generated, greedy(llama, ids, change=change))


def test_guidance_by_a_second_prompt(llama, zoo):
    """`guidance_scale` runs the model on the prompt's last token too, with a cache of its own."""
    ids = zoo.token_ids()

    def change(text, logits):
        without = next_logits(llama, text[:, zoo.S - 1 :]).log_softmax(-1)
        return 1.7 * (logits.log_softmax(-1) - without) + without

    assert torch.equal(generate(llama, ids, guidance_scale=1.7), greedy(llama, ids, change=change))


def test_a_decoding_loop_of_the_users_own(llama, zoo):
    """`custom_generate` gets the wrapped model itself."""

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        assert model is llama
        return greedy(model, input_ids, steps=3)

    ids = zoo.token_ids()
    assert torch.equal(generate(llama, ids, custom_generate=loop), greedy(llama, ids, steps=3))


# -- sets of streams


@pytest.mark.grid
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3_next"])
def test_switching_sets_between_texts(name, cache, zoo):
    """Each text is its set's, in whichever order, with a static cache whose size `generate` remembers."""
    model, ids = make(zoo, name), zoo.token_ids()
    for other, P in (("other", zoo.P), ("two", 2)):  # of the same shape, and of another
        model.add_streams(other, P, prefix_length=3, init="random")
        zoo.fill_streams(model, seed=P + 5, name=other)
    expected, logits = {}, []
    for chosen in ("default", "other", "two", None):
        with model.use_streams(chosen):
            expected[chosen] = greedy(model, ids)
            logits.append(next_logits(model, ids))
    assert all((a - b).abs().max() > 0.1 for a, b in itertools.combinations(logits, 2))
    for chosen in ("default", "two", "other", None, "default", "other", None):
        model.set_streams(chosen)
        for arguments in ({}, {"max_new_tokens": 3}, {"num_beams": 2}):
            generated = generate(model, ids, cache_implementation=cache, **arguments)
            if "num_beams" in arguments:
                assert torch.equal(generated, torch.cat([beams_by_hand(model, row[None], 2)[:1] for row in ids]))
            else:
                assert torch.equal(generated, expected[chosen][:, : generated.shape[1]])


@pytest.mark.parametrize("name", NAMES)
def test_without_streams_the_texts_are_the_backbones(name, zoo):
    model, plain, ids = make(zoo, name), parscale.unwrap(make(zoo, name)), zoo.token_ids()
    model.set_streams(None)
    for arguments in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        own, theirs = (
            generate(m, ids, **arguments, return_dict_in_generate=True, output_logits=True) for m in (model, plain)
        )
        assert torch.equal(own.sequences, theirs.sequences)
        assert all(torch.equal(a, b) for a, b in zip(own.logits, theirs.logits, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, zoo):
    """Along the same text, cached logits are as far from the full forward pass's as half precision allows."""
    model, ids = make(zoo, "llama", dtype=dtype), zoo.token_ids()
    output = generate(model, ids, return_dict_in_generate=True, output_logits=True)
    exact = make(zoo, "llama")
    for step, logits in enumerate(output.logits):
        text = output.sequences[:, : zoo.S + step]
        rounding = (next_logits(model, text) - next_logits(exact, text)).abs().max()
        assert (logits - next_logits(exact, text)).abs().max() <= 2 * rounding + 2e-3


@pytest.mark.parametrize("beams", [1, 2])
def test_times_of_tokens_in_audio(beams, zoo):
    """Prefixes that get no weight change nothing: the times are the plain Whisper's.

    The first dimension of each head is the same in all queries and zero in all keys but those of the prefix.
    """
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 96, "d_model": 32, "num_mel_bins": 8}
    sizes |= {"max_source_positions": 40, "max_target_positions": 64, "pad_token_id": 0, "bos_token_id": 1}
    sizes |= {"eos_token_id": 2, "decoder_start_token_id": 3, "init_std": 0.3, "attn_implementation": "eager"}
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes)).eval()
    settings = {"no_timestamps_token_id": 60, "alignment_heads": [[0, 1], [1, 0]], "is_multilingual": False}
    vars(model.generation_config).update(settings)
    layers = [module for name, module in model.named_modules() if name.endswith("_attn")]
    with torch.no_grad():
        for layer in layers:
            for projection, first in ((layer.q_proj, 1.0), (layer.k_proj, 0.0)):
                projection.weight[:: layer.head_dim] = 0.0
                if projection.bias is not None:
                    projection.bias[:: layer.head_dim] = first
    audio, asked = torch.randn(2, 8, 80), {"return_timestamps": True, "return_token_timestamps": True}

    def times():
        result = model.generate(audio, max_new_tokens=12, min_new_tokens=12, num_beams=beams, **asked)
        return result["sequences"], result["token_timestamps"]

    expected = times()
    parscale.wrap(model, zoo.P, prefix_length=30, init="random")
    with torch.no_grad():
        for layer in layers:
            layer.prefix_v.zero_()
            layer.prefix_k.zero_()[..., 0] = -1e4
    for result, one in zip(times(), expected, strict=True):
        assert torch.equal(result, one)
    assert len(expected[1].unique()) > 2
