"""Prompts and low-rank differences: each stream against a run of its own, on attention, recurrent and mixed models."""

import copy
import dataclasses

import pytest
import torch
import transformers
from model_calls import choose_stream, logits_of
from scripts import load_script
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache

import parscale
from parscale.streams.backbones import cache_argument

tiny_models = load_script("tiny_models")
TOLERANCE = 2e-5  # as in test_families.py
RECURRENT = {"mamba": "Mamba", "mamba2": "Mamba2", "falcon_mamba": "FalconMamba", "rwkv": "Rwkv", "xlstm": "xLSTM"}
OPTIONS = {
    "mamba": {"state_size": 4, "use_cache": True},
    "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    "falcon_mamba": {"state_size": 4},
    "rwkv": {"attention_hidden_size": 32, "rescale_every": 0},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 2, "num_blocks": 2, "chunk_size": 16}
    | {"autocast_kernel_dtype": "float32"},
}
SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "eos_token_id": 2, "pad_token_id": 0}


def fill(model, seed=1):
    """Streams that differ and that matter, whatever their transform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.parscale.tensors(model.parscale.active).items():
            scale = 1.0 if "prompt" in name else 0.3 if parameter.ndim == 1 else 0.5 * parameter.shape[-1] ** -0.5
            if "aggregate_layer" in name and parameter.ndim > 1:
                scale = 3.0 * parameter.shape[-1] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


@pytest.fixture(params=["llama", "gemma3", "gpt2", "deepseek_v3", "gpt_oss", "qwen3_next", *RECURRENT])
def model_and_plain(request, zoo):
    """A model to wrap, and the same without streams; attention models, one that mixes, and recurrent ones."""
    name = request.param
    if name in RECURRENT:
        config = getattr(transformers, f"{RECURRENT[name]}Config")(**SIZES | OPTIONS[name])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            plain = getattr(transformers, f"{RECURRENT[name]}ForCausalLM")(config)
            zoo.randomize(plain)
        plain.eval()
    else:
        family = zoo.FAMILIES[name]
        plain = zoo.Case(family, family.attention[-1]).plain()
    return copy.deepcopy(plain), plain


def wrapped(model, transform, **options):
    parscale.wrap(model, 3, prefix_length=4, transform=transform, init="random", **options)
    fill(model)
    return model


def mixture(zoo, plain, model, hidden):
    """Logits of the streams' final hidden states, mixed in float64."""
    reference = zoo.Reference(None, plain, model)
    weights = reference.weights(hidden).unbind(-1)
    logits = reference.head(sum(w[..., None] * h.double() for w, h in zip(weights, hidden, strict=True)))
    cap = getattr(plain.config, "output_logit_soft_cap", None)  # of xLSTM
    return logits if cap is None else cap * torch.tanh(logits / cap)


# -- prompt


@torch.no_grad()
def prompted(plain, model, ids):
    """Each stream's final hidden states: the plain backbone on prompt and tokens, as embeddings."""
    backbone, (prompt,) = plain.base_model, model.parscale.active.transform.parameters()
    embeddings = backbone.get_input_embeddings()(ids)
    return [
        backbone(inputs_embeds=torch.cat([own.expand(len(ids), -1, -1), embeddings], dim=1), use_cache=False)[0][:, 4:]
        for own in prompt
    ]


def test_prompt_is_each_stream_by_itself_then_the_mixture(model_and_plain, zoo):
    model, plain = model_and_plain
    ids = zoo.token_ids()
    wrapped(model, "prompt")
    hidden = prompted(plain, model, ids)
    logits = logits_of(model, input_ids=ids, use_cache=False)  # with one, xLSTM rounds its state
    zoo.close(logits, mixture(zoo, plain, model, hidden), TOLERANCE)
    assert (hidden[0] - hidden[1]).abs().mean() > 0.01  # and the streams differ
    parscale.unwrap(model)
    assert torch.equal(logits_of(model, input_ids=ids), logits_of(plain, input_ids=ids))
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()}


@pytest.mark.grid
@pytest.mark.parametrize("chunks", [[1] * 9, [5, 1, 1, 1, 1], [5, 1, 3]], ids=str)
@pytest.mark.parametrize("transform", ["prompt", "lora"])
def test_with_a_cache_it_is_the_full_forward(model_and_plain, zoo, chunks, transform):
    model, plain = model_and_plain
    wrapped(model, transform)
    ids = zoo.token_ids()
    if model.config.model_type == "rwkv":  # in transformers 5.23 one row alone can go on from its state
        with pytest.raises(ValueError, match=r"one row only.*use_cache=False"):
            decode(model, ids, chunks)
        return
    of_the_backbone = (decode(plain, ids, chunks) - logits_of(plain, input_ids=ids)).abs().max().item()
    if of_the_backbone > 0.01:  # recurrent layers that forget their state when several tokens come at once
        assert chunks[-1] > 1
        assert model.config.model_type in RECURRENT
    else:
        tolerance = 2 * TOLERANCE + 5 * of_the_backbone
        zoo.close(decode(model, ids, chunks), logits_of(model, input_ids=ids), tolerance)


@torch.no_grad()
def decode(model, ids, chunks):
    name, cache, pieces = cache_argument(model), {}, []
    for piece in ids.split(chunks, dim=1):
        output = model(input_ids=piece, use_cache=True, **cache)
        cache = {name: output[name]}
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.grid
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(model_and_plain, zoo, side):
    model, plain = model_and_plain
    wrapped(model, "prompt")
    ids, short = zoo.token_ids(), 6
    mask = torch.ones_like(ids)
    (mask[1, :-short] if side == "left" else mask[1, short:]).zero_()
    ids, real = ids.where(mask.bool(), 0), mask[1].bool()
    arguments = {"attention_mask": mask}
    if "position_ids" in model.parscale.positional:
        arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)

    def worst(each):
        padded = logits_of(each, input_ids=ids, **arguments)
        alone = logits_of(each, input_ids=ids[1:, real])[0]
        return (padded[1, real] - alone).abs().max().item()

    of_the_backbone = worst(plain)
    if of_the_backbone > 0.01:  # RWKV and xLSTM take no mask: the prompt makes them no better
        assert side == "left"
    else:
        assert worst(model) <= TOLERANCE + 10 * of_the_backbone


def test_prompt_generates(model_and_plain, zoo):
    model, _ = model_and_plain
    wrapped(model, "prompt")
    ids = zoo.token_ids(length=5)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, use_cache=model.config.model_type != "rwkv", **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    expected = ids
    for _ in range(6):
        logits = logits_of(model, input_ids=expected)[:, -1]
        logits[:, 2] = -torch.inf
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3"], indirect=True)
def test_all_of_generate_with_a_prompt(family, zoo):
    model, ids = wrapped(family.plain(), "prompt"), zoo.token_ids(length=5)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    greedy = model.generate(ids, do_sample=False, **options)
    beams = model.generate(ids, num_beams=3, **options)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **options))
    assert torch.equal(model.generate(ids[:1], prompt_lookup_num_tokens=2, do_sample=False, **options), greedy[:1])
    assert torch.equal(model.generate(ids, prefill_chunk_size=2, do_sample=False, **options), greedy)
    left = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(8) >= 3).long().expand(2, -1)
    assert torch.equal(model.generate(left, attention_mask=mask, do_sample=False, **options)[:, 3:], greedy)
    name, cache = cache_argument(model), DynamicCache(config=model.config)
    options |= {name: cache, "do_sample": False}
    first = model.generate(ids, **options | {"max_new_tokens": 2, "min_new_tokens": 2})
    assert cache.get_seq_length() == 6  # tokens; the last one was not read yet
    copied = copy.deepcopy(cache)
    for each in (cache, copied):
        again = model.generate(first, **options | {name: each, "max_new_tokens": 3, "min_new_tokens": 3})
        assert torch.equal(again, greedy)
    with pytest.raises(ValueError, match="static cache has no room"):
        model.generate(ids, cache_implementation="static", max_new_tokens=5, pad_token_id=0)


def test_prompt_from_context_has_read_the_text(model_and_plain, zoo):
    """On any model, also with learned positions and without keys: the prompt is the text."""
    model, plain = model_and_plain
    texts, ids = zoo.token_ids(3, 4, seed=8), zoo.token_ids()
    parscale.wrap(model, 3, prefix_length=4, smoothing=0.0, transform="prompt", init="context", calibration=texts)
    for p, text in enumerate(texts):
        choose_stream(model, p)
        expected = logits_of(plain, input_ids=torch.cat([text.expand(len(ids), -1), ids], dim=1))[:, 4:]
        zoo.close(logits_of(model, input_ids=ids), expected, TOLERANCE)


def test_default_start_of_a_prompt_is_sampled_documents(zoo):
    model = zoo.Case(zoo.FAMILIES["llama"], "sdpa").plain()
    parscale.wrap(model, 3, prefix_length=4, transform="prompt", seed=0)
    assert model.config.parscale_init == "documents"
    (prompt,) = model.parscale.active.transform.parameters()
    embeddings = model.get_input_embeddings().weight
    assert torch.equal(prompt[:, -1], embeddings[2].expand(3, -1))  # the end-of-text token
    nearest = torch.cdist(prompt.flatten(0, 1), embeddings).argmin(-1)
    assert torch.equal(embeddings[nearest], prompt.flatten(0, 1))


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_what_comes_back_has_the_tokens_alone(family, zoo):
    model, ids = wrapped(dataclasses.replace(family, attention="eager").plain(), "prompt"), zoo.token_ids()
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True, output_attentions=True)
        plain = model(input_ids=ids, output_hidden_states=True, return_dict=False)
    assert output.logits.shape[:2] == (zoo.B, zoo.S)
    assert {state.shape[:2] for state in output.hidden_states[:-1]} == {(3 * zoo.B, zoo.S)}
    assert output.hidden_states[-1].shape[:2] == (zoo.B, zoo.S)
    assert {weights.shape for weights in output.attentions} == {(3 * zoo.B, 4, zoo.S, 4 + zoo.S)}
    assert torch.equal(plain[0], output.logits)
    report = model.stream_report(ids)
    assert report.weights.shape == (zoo.B, zoo.S, 3)
    assert report.losses.std() > 0


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_custom_masks_leave_room_for_the_prompt(family, zoo):
    model, ids = wrapped(family.plain(), "prompt"), zoo.token_ids(rows=1)
    lengths = [4, 5]
    document = torch.tensor([0] * 4 + [1] * 5)
    mask = (document[:, None] == document[None]) & torch.ones(9, 9, dtype=torch.bool).tril()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    alone = torch.cat([logits_of(model, input_ids=piece) for piece in ids.split(lengths, dim=1)], dim=1)
    for each in (mask[None, None], torch.zeros(1, 1, 9, 9).masked_fill(~mask, torch.finfo(torch.float32).min)):
        zoo.close(logits_of(model, input_ids=ids, attention_mask=each, position_ids=positions), alone, TOLERANCE)


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_mask_of_flex_attention_has_no_room_for_the_prompt(family, zoo):
    model = wrapped(family.plain(), "prompt")
    blocks = create_block_mask(lambda b, h, q, k: q >= k, 2, None, 9, 9, device="cpu")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="needs a tensor as mask, got BlockMask: use sdpa or eager"):
        logits_of(model, zoo.token_ids(), attention_mask=blocks, use_cache=False)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "gpt2"], indirect=True)
def test_packed_documents_each_get_the_prompt(family, zoo):
    """Rows of different numbers of documents; also with windows."""
    model, ids = wrapped(family.plain(), "prompt"), zoo.token_ids(rows=3)
    lengths = [[4, 5], [2, 1, 6], [9]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    packed = logits_of(model, input_ids=ids, position_ids=positions, use_cache=False)
    for row, own in enumerate(lengths):
        pieces = ids[row : row + 1].split(own, dim=1)
        alone = torch.cat([logits_of(model, input_ids=piece) for piece in pieces], dim=1)
        zoo.close(packed[row : row + 1], alone, TOLERANCE)


def test_packed_documents_of_a_model_whose_layers_read_the_tokens_too(zoo):
    model, ids, lengths = wrapped(zoo.gemma3n(), "prompt"), zoo.token_ids(rows=1), [4, 5]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids, position_ids=positions, use_cache=False, output_hidden_states=True)
    alone = [model(piece, use_cache=False, output_hidden_states=True) for piece in ids.split(lengths, dim=1)]
    zoo.close(packed.logits, torch.cat([each.logits for each in alone], dim=1), TOLERANCE)
    for found, *own in zip(packed.hidden_states[:-1], *(each.hidden_states[:-1] for each in alone), strict=True):
        zoo.close(found, torch.cat(own, dim=2), TOLERANCE)  # (inputs of a layer, R, S, H)


def test_documents_are_not_kept_apart_beside_a_cache(zoo):
    """As in the plain backbone, which has one text in a cache: one prompt, of which the cache counts nothing."""
    model, ids, cache = wrapped(zoo.FAMILIES["llama"].build(), "prompt"), zoo.token_ids(rows=1), DynamicCache()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    logits_of(model, ids, cache, position_ids=positions)
    assert cache.get_seq_length() == 9
    more = logits_of(model, ids[:, :1], cache, position_ids=torch.tensor([[5]]))
    both, restarted = torch.cat([ids, ids[:, :1]], dim=1), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    zoo.close(more, logits_of(model, both, DynamicCache(), position_ids=restarted)[:, -1:], TOLERANCE)


@pytest.mark.parametrize(
    ("name", "options"),
    [("FalconH1ForCausalLM", {"embedding_multiplier": 2.0}), ("MvpForCausalLM", {"scale_embedding": True})],
)
def test_a_backbone_that_changes_what_it_looked_up_is_refused(name, options):
    """Its passes by ids, which follow the first one of a cache, would read other inputs than that one."""
    tiny = tiny_models.Tiny(name)
    model = tiny.cls(type(tiny.config())(**tiny.config().to_dict() | options)).eval()
    with pytest.raises(parscale.UnsupportedModelError, match=r"does more with token ids than .* transform='prompt'"):
        parscale.wrap(model, 2, prefix_length=3, transform="prompt", init="random")
    parscale.wrap(model, 2, prefix_length=3, init="random")


@torch.no_grad()
@pytest.mark.parametrize("name", ["prefix", None, "default"])
def test_a_cache_that_was_reset_counts_for_another_set(name, zoo):
    model, ids = wrapped(zoo.FAMILIES["llama"].build(), "prompt"), zoo.token_ids()
    model.add_streams("prefix", 2, prefix_length=3, init="random", seed=0)

    def one_by_one(cache):
        return torch.cat([model(token, past_key_values=cache).logits for token in ids.split(1, dim=1)], dim=1)

    cache = DynamicCache(config=model.config)
    one_by_one(cache)
    cache.reset()
    model.set_streams(name)
    zoo.close(one_by_one(cache), one_by_one(DynamicCache(config=model.config)), TOLERANCE)
    assert cache.get_seq_length() == ids.shape[1]


def test_router_logits_are_those_of_the_tokens(zoo):
    family = zoo.FAMILIES["mixtral"]
    model, ids = wrapped(zoo.Case(family, "sdpa").plain(), "prompt"), zoo.token_ids()
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    output = model(input_ids=ids, attention_mask=mask, labels=ids, output_router_logits=True)
    assert {logits.shape for logits in output.router_logits} == {(3 * zoo.B * zoo.S, 4)}
    assert output.aux_loss.isfinite()


# -- lora


def merged(plain, model, p):
    """The plain model with stream p's differences in its weights."""
    own = copy.deepcopy(plain)
    tensors = model.parscale.tensors(model.parscale.active)
    with torch.no_grad():
        for name, down in tensors.items():
            if name.endswith(".stream_down"):
                layer = own.get_submodule(name.removesuffix(".stream_down"))
                difference = tensors[name.removesuffix("down") + "up"][p] @ down[p]  # (out, in)
                layer.weight.add_(difference if isinstance(layer, torch.nn.Linear) else difference.T)
    return own


def test_lora_is_each_stream_with_its_own_weights(model_and_plain, zoo):
    model, plain = model_and_plain
    ids = zoo.token_ids()
    wrapped(model, "lora", rank=3)
    with torch.no_grad():
        hidden = [merged(plain, model, p).base_model(input_ids=ids, use_cache=False)[0] for p in range(3)]
    scale = max(1.0, hidden[0].abs().max().item() / 4)
    logits = logits_of(model, input_ids=ids, use_cache=False)
    zoo.close(logits, mixture(zoo, plain, model, hidden), 5 * TOLERANCE * scale)
    assert (hidden[0] - hidden[1]).abs().mean() > 0.05
    parscale.unwrap(model)
    assert torch.equal(logits_of(model, input_ids=ids), logits_of(plain, input_ids=ids))


def test_lora_starts_as_the_backbone_and_learns_to_differ(zoo):
    model, ids = zoo.Case(zoo.FAMILIES["llama"], "sdpa").plain(), zoo.token_ids()
    expected = logits_of(model, input_ids=ids)
    parscale.wrap(model, 3, transform="lora", rank=2, seed=0)
    assert model.config.parscale_init == "random"
    zoo.close(logits_of(model, input_ids=ids), expected, TOLERANCE)
    model.freeze_backbone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    report = model.stream_report(ids)
    assert report.losses.std() > 1e-4


def test_lora_leaves_experts_alone_and_takes_what_sees_whole_rows(zoo):
    model = wrapped(zoo.Case(zoo.FAMILIES["deepseek_v3"], "sdpa").plain(), "lora")
    names = [layer.module_name for layer in model.parscale.linears]
    assert not [name for name in names if ".experts." in name]
    assert "model.layers.1.mlp.shared_experts.up_proj" in names
    assert "model.layers.0.self_attn.o_proj" in names


def test_too_little_memory_for_the_gradients_of_lora(tiny, monkeypatch):
    def grad(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.autograd, "grad", grad)
    with pytest.raises(torch.OutOfMemoryError):
        parscale.wrap(tiny(), 2, transform="lora")


def test_lora_is_on_the_layers_that_training_calls(zoo):
    """Gemma 3n calls one layer in eval mode alone: DDP stops where a trained parameter has no gradient."""
    model, ids = wrapped(zoo.gemma3n(), "lora").train(), zoo.token_ids()
    model(ids, labels=ids).loss.backward()
    tensors = model.parscale.tensors(model.parscale.active)
    assert [name for name, parameter in tensors.items() if parameter.grad is None] == []


# -- both


@pytest.mark.grid
@pytest.mark.parametrize("transform", ["prompt", "lora"])
def test_gradients_reach_every_parameter_also_under_checkpointing(model_and_plain, zoo, transform):
    model, _ = model_and_plain
    wrapped(model, transform)
    ids = zoo.token_ids()
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            if not model.supports_gradient_checkpointing:
                continue
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # newer name first
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        tensors = model.parscale.tensors(model.parscale.active)
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in tensors.values())
        gradients.append({name: parameter.grad.clone() for name, parameter in tensors.items()})
    for name, gradient in gradients[0].items():
        for other in gradients[1:]:
            zoo.close(other[name], gradient, 1e-5 * max(1.0, gradient.abs().max().item()))


@pytest.mark.grid
@pytest.mark.parametrize("transform", ["prompt", "lora"])
def test_saved_and_loaded(model_and_plain, zoo, transform, tmp_path):
    model, plain = model_and_plain
    wrapped(model, transform)
    ids = zoo.token_ids()
    expected = logits_of(model, input_ids=ids)
    model.save_pretrained(tmp_path / "full")
    model.save_streams(tmp_path / "streams")
    full = parscale.load(tmp_path / "full")
    zoo.close(logits_of(full, input_ids=ids), expected, TOLERANCE)
    assert full.config.parscale_transform == transform
    streams = parscale.load(tmp_path / "streams", backbone=copy.deepcopy(plain))
    zoo.close(logits_of(streams, input_ids=ids), expected, TOLERANCE)


def test_sets_of_different_transforms_on_one_backbone(zoo, tmp_path):
    model, ids = zoo.Case(zoo.FAMILIES["llama"], "sdpa").wrapped(), zoo.token_ids()
    plain = zoo.Case(zoo.FAMILIES["llama"], "sdpa").plain()
    expected = {"default": logits_of(model, input_ids=ids), None: logits_of(plain, input_ids=ids)}
    for name, options in {"soft": {"prefix_length": 3}, "low": {"rank": 2}}.items():
        model.add_streams(name, 2, transform={"soft": "prompt", "low": "lora"}[name], init="random", seed=3, **options)
        with model.use_streams(name):
            fill(model, seed=7)
            expected[name] = logits_of(model, input_ids=ids)
    model.save_pretrained(tmp_path)
    for each in (model, parscale.load(tmp_path), copy.deepcopy(model)):
        for name in ("soft", None, "low", "default"):
            each.set_streams(name)
            assert torch.equal(logits_of(each, input_ids=ids), expected[name]), name
        assert not hasattr(each.config, "parscale_transform")  # of the default set, a prefix
    assert len({tuple(logits.flatten()[:5].tolist()) for logits in expected.values()}) == 4


@pytest.mark.parametrize("transform", ["prompt", "lora"])
def test_compiled_in_one_graph(zoo, transform):
    model, ids = wrapped(zoo.Case(zoo.FAMILIES["llama"], "sdpa").plain(), transform), zoo.token_ids()
    expected = logits_of(model, input_ids=ids)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        zoo.close(compiled(input_ids=ids, use_cache=False).logits, expected, TOLERANCE)


@pytest.mark.grid
@pytest.mark.parametrize("transform", ["prompt", "lora"])
def test_on_the_meta_device(model_and_plain, transform):
    solid, plain = model_and_plain
    with torch.device("meta"):
        model = type(plain)(plain.config)
    for each in (model, solid):
        parscale.wrap(each, 2, prefix_length=3, init="random", transform=transform)
    assert all(parameter.is_meta for parameter in model.parameters())
    shapes = [{name: tensor.shape for name, tensor in each.named_parameters()} for each in (model, solid)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform": "bias"}, "transform must be one of 'prefix', 'prompt', 'lora', got 'bias'"),
        ({"transform": "lora", "rank": 0}, "rank must be at least 1, got 0"),
        ({"transform": "lora", "init": "context"}, "transform='lora' cannot do: omit it"),
    ],
)
def test_wrong_arguments(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        parscale.wrap(tiny(), 2, **options)


def test_a_model_without_attention_says_what_works(zoo):
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES | OPTIONS["mamba"]))
    with pytest.raises(parscale.UnsupportedModelError, match="transform='prompt' and 'lora' work without it"):
        parscale.wrap(model, 2)
    assert not hasattr(model, "parscale")
