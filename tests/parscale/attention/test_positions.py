"""Left-padded texts without positions, as trainers and embedding code give them: each is what it is alone.

The measure is the plain backbone: where its answer does not depend on the padding, that of the streams does not either.
"""

import inspect

import pytest
import torch
import transformers
from model_calls import logits_of
from transformers import DynamicCache, StaticCache

import parscale

FRONT = 3  # padding tokens in front of each row
ROUNDING = 1e-5  # float32, of logits of size 1 to 5; the plain backbones' own differences are at most 2.4e-6


def padded(ids):
    """`(B, S)` as `(B, FRONT + S)`, and its mask."""
    front = torch.zeros(ids.shape[0], FRONT, dtype=torch.long)
    return torch.cat([front, ids], dim=1), torch.cat([front, torch.ones_like(ids)], dim=1)


def of_padded(model, ids, way):
    """Logits of the real tokens of left-padded rows: at once, or piece by piece into a cache."""
    whole, mask = padded(ids)
    if way == "at once":
        return logits_of(model, whole, attention_mask=mask, use_cache=False)[:, FRONT:]
    if way == "embeddings":
        with torch.no_grad():
            embeddings = model.get_input_embeddings()(whole)
            return model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits[:, FRONT:]
    cache = StaticCache(config=model.config, max_cache_len=24) if way == "static cache" else DynamicCache()
    pieces, end = [], 0
    for width in (2, 4, whole.shape[1] - 8, 1, 1):  # the first has padding alone
        start, end = end, end + width
        pieces.append(logits_of(model, whole[:, start:end], attention_mask=mask[:, :end], cache=cache, use_cache=True))
    return torch.cat(pieces, dim=1)[:, FRONT:]


def difference(model, ids, way):
    return (of_padded(model, ids, way) - logits_of(model, ids)).abs().max().item()


WAYS = ["at once", "embeddings", "dynamic cache", "static cache"]
FEW = ["llama", "phi3", "qwen3_next"]


@pytest.mark.grid
@pytest.mark.parametrize("way", WAYS)
def test_padding_in_front_changes_nothing(case, way, zoo):
    if case.family.attention_layers and "cache" in way:
        pytest.skip("the recurrent layers of the plain backbone take padding for text where it comes in pieces")
    ids, plain = zoo.token_ids(), case.plain()
    own = difference(plain, ids, way)
    if case.family.name == "GPT2":  # looks up what stands at a place, padding or not
        assert own > 0.1
        return
    assert own < ROUNDING
    model = case.wrapped()
    assert difference(model, ids, way) < 2 * ROUNDING
    model.set_streams(None)
    assert torch.equal(of_padded(model, ids, way), of_padded(plain, ids, way))


@pytest.mark.grid
@pytest.mark.parametrize("way", ["at once", "dynamic cache"])
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("transform", ["prompt", "lora"])
def test_other_transforms(transform, name, way, zoo):
    if name == "qwen3_next" and way != "at once":
        pytest.skip("the recurrent layers of the plain backbone take padding for text where it comes in pieces")
    model = parscale.wrap(zoo.Case(zoo.FAMILIES[name]).plain(), 3, prefix_length=4, init="random", transform=transform)
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if "stream_up" in own or own.endswith("prompt"):
                parameter.normal_()
    assert difference(model, zoo.token_ids(), way) < 5 * ROUNDING


@pytest.mark.parametrize("name", ["gemma3", "qwen3_next", "mpt"])
def test_a_prompt_whose_place_counts_asks_for_all_padding_at_once(name, zoo):
    """Behind windows, in recurrent states, and where positions are those of columns."""
    if name == "mpt":
        plain = transformers.MptForCausalLM(transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=96))
    else:
        plain = zoo.Case(zoo.FAMILIES[name]).plain()
    model, ids = parscale.wrap(plain.eval(), 3, prefix_length=4, init="random", transform="prompt"), zoo.token_ids()
    whole, mask = padded(ids)

    def in_pieces(width):
        cache = DynamicCache(config=model.config)
        first = logits_of(model, whole[:, :width], attention_mask=mask[:, :width], cache=cache, use_cache=True)
        rest = logits_of(model, whole[:, width:], attention_mask=mask, cache=cache, use_cache=True)
        return torch.cat([first, rest], dim=1)[:, FRONT:]

    zoo.close(in_pieces(FRONT), logits_of(model, ids), 5 * ROUNDING)
    with pytest.raises(ValueError, match=r"3 padding tokens in front, but .* its cache read 2 columns.*Read all"):
        in_pieces(FRONT - 1)


SMALL = {"vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
LEARNED = {
    "GPT2LMHeadModel": {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "GPTNeoForCausalLM": SMALL | {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "WhisperForCausalLM": {"vocab_size": 96, "d_model": 32, "max_target_positions": 64, "pad_token_id": 0}
    | {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 4))},
}


@pytest.mark.parametrize("name", LEARNED)
def test_a_prompt_and_learned_positions(name, zoo):
    """Those that nobody passes are those of columns; behind GPT-Neo's window the prompt's place counts in any case."""
    cls = getattr(transformers, name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(cls.config_class(**LEARNED[name])).eval()
        zoo.randomize(model)
    model, ids = parscale.wrap(model, 3, prefix_length=4, init="random", transform="prompt"), zoo.token_ids()
    with torch.no_grad():
        model.parscale.active.transform.parameters()[0].normal_()
    whole, mask = padded(ids)
    counted = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}

    def in_pieces(width, **positions):
        cache, pieces = DynamicCache(config=model.config), []
        for piece in (slice(width), slice(width, None)):
            arguments = {"attention_mask": mask[:, : piece.stop]} | {k: x[:, piece] for k, x in positions.items()}
            pieces.append(logits_of(model, whole[:, piece], cache=cache, use_cache=True, **arguments))
        return torch.cat(pieces, dim=1)[:, FRONT:]

    at_once = logits_of(model, whole, attention_mask=mask, use_cache=False)[:, FRONT:]
    zoo.close(in_pieces(FRONT), at_once, 5 * ROUNDING)
    remedy = ", pass position_ids, or" if name == "GPT2LMHeadModel" else ", or"
    message = rf"3 padding tokens in front, but .* its cache read 2 columns.* in the first pass{remedy} use transform="
    with pytest.raises(ValueError, match=message):
        in_pieces(FRONT - 1)
    if name == "GPT2LMHeadModel":
        zoo.close(in_pieces(FRONT - 1, **counted), logits_of(model, ids), 5 * ROUNDING)
    elif name == "GPTNeoForCausalLM":
        with pytest.raises(ValueError, match=message):
            in_pieces(FRONT - 1, **counted)


def test_a_prompt_of_a_model_that_counts_positions_from_ids(zoo):
    sizes = zoo.COMMON | {"max_position_embeddings": 32, "pad_token_id": 1, "is_decoder": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.RobertaForCausalLM(transformers.RobertaConfig(**sizes)).eval()
        zoo.randomize(model)
    ids = zoo.token_ids()
    whole, mask = padded(ids)
    whole = whole.where(mask.bool(), 1)

    def error():
        rows = logits_of(model, whole, attention_mask=mask, use_cache=False)[:, FRONT:]
        return (rows - logits_of(model, ids, use_cache=False)).abs().max().item()

    assert error() < ROUNDING
    parscale.wrap(model, 3, prefix_length=4, init="random", transform="prompt")
    with torch.no_grad():
        model.parscale.active.transform.parameters()[0].normal_()
    assert error() < ROUNDING


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_what_generate_says(name, zoo):
    model, ids = zoo.Case(zoo.FAMILIES[name]).wrapped(), zoo.token_ids()
    whole, mask = padded(ids)
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    output = model.generate(whole, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **arguments)
    for step, logits in enumerate(output.logits):
        text = output.sequences[:, : whole.shape[1] + step]
        seen = torch.cat([mask, torch.ones(zoo.B, step, dtype=torch.long)], dim=1)
        zoo.close(logits, logits_of(model, text, attention_mask=seen)[:, -1], 2 * ROUNDING)


@pytest.mark.grid
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("changes", [{}, {"prefill_chunk_size": 2}], ids=["at once", "in chunks"])
def test_a_static_cache_where_forward_names_no_positions(changes, attention, zoo):
    """As some models of audio: `generate` gives masks for each kind of layer, and no positions."""
    case, ids = zoo.Case(zoo.FAMILIES["qwen3"], attention), zoo.token_ids()
    model = case.wrapped()
    signature = inspect.signature(type(model).forward)

    class WithoutPositions(type(model)):
        def forward(self, *args, **kwargs):
            assert "position_ids" not in kwargs
            return super().forward(*args, **kwargs)

    names = [parameter for name, parameter in signature.parameters.items() if name != "position_ids"]
    WithoutPositions.forward.__signature__ = signature.replace(parameters=names)
    model.__class__ = WithoutPositions
    whole, mask = padded(ids)
    arguments = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    arguments |= {"return_dict_in_generate": True, "output_logits": True} | changes
    output = model.generate(whole, attention_mask=mask, **arguments)
    reference = case.reference(model)
    for step, logits in enumerate(output.logits):
        zoo.close(logits, reference.logits(output.sequences[:, FRONT : whole.shape[1] + step])[:, -1], 2 * ROUNDING)


def test_rows_of_different_lengths(family, zoo):
    model, ids = family.wrapped(), zoo.token_ids()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    if family.family.name == "GPT2":
        with_places = logits_of(model, ids, attention_mask=mask, position_ids=torch.arange(zoo.S)[None])
        assert torch.equal(logits_of(model, ids, attention_mask=mask), with_places)
        return
    logits = logits_of(model, ids, attention_mask=mask)
    zoo.close(logits[0], logits_of(model, ids[:1])[0], 5 * ROUNDING)
    zoo.close(logits[1, 4:], logits_of(model, ids[1:, 4:])[0], 5 * ROUNDING)


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3"], indirect=True)
def test_zeros_inside_a_mask_keep_their_places(family, zoo):
    model, ids = family.wrapped(), zoo.token_ids()
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1, 1, 1, 1]])
    positions = torch.stack([torch.arange(9), (torch.arange(9) - 2).clamp(min=0)])
    expected = family.reference(model).logits(ids, positions, padding=mask)
    logits = logits_of(model, ids, attention_mask=mask)
    zoo.close(logits[mask.bool()], expected[mask.bool()], 2 * ROUNDING)


@pytest.mark.parametrize("case", ["llama-eager", "llama-sdpa", "gemma3-sdpa", "gpt_oss-eager"], indirect=True)
def test_without_padding_the_same_bits(case, zoo):
    model, ids = case.wrapped(), zoo.token_ids()
    own = logits_of(model, ids, attention_mask=torch.ones_like(ids))
    places = torch.arange(zoo.S)[None]
    assert torch.equal(own, logits_of(model, ids, attention_mask=torch.ones_like(ids), position_ids=places))
    assert torch.equal(own, logits_of(model, ids))


@pytest.mark.parametrize("case", ["llama-eager", "llama-sdpa"], indirect=True)
def test_positions_that_are_given_stay(case, zoo):
    model, ids = case.wrapped(), zoo.token_ids()
    whole, mask = padded(ids)
    places = torch.arange(whole.shape[1]).expand(zoo.B, -1)
    logits = logits_of(model, whole, attention_mask=mask, position_ids=places)
    expected = case.reference(model).logits(whole, places, padding=mask)
    zoo.close(logits[:, FRONT:], expected[:, FRONT:], 2 * ROUNDING)
    assert (logits[:, FRONT:] - logits_of(model, ids)).abs().max() > 0.1


@torch.no_grad()
def test_a_pass_that_failed_counts_in_no_later_one(zoo):
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**zoo.COMMON)).eval()
    parscale.wrap(model, 3, prefix_length=4, init="random")
    zoo.fill_streams(model)
    whole, mask = padded(zoo.token_ids())
    arguments = {"attention_mask": mask, "position_ids": torch.arange(whole.shape[1]).expand(zoo.B, -1)}
    expected = model.model(whole, **arguments)[0]

    def fail(*_):
        raise RuntimeError("half-way")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="half-way"):
        model(whole, attention_mask=mask)
    hook.remove()
    assert torch.equal(model.model(whole, **arguments)[0], expected)


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.nightly)], indirect=True)
def test_compiled(family, zoo):
    model, ids = family.wrapped(), zoo.token_ids()
    whole, mask = padded(ids)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    zoo.close(
        logits_of(compiled, whole, attention_mask=mask, use_cache=False)[:, FRONT:], logits_of(model, ids), 2 * ROUNDING
    )
    torch.compiler.reset()


# -- encoders, and encoders with decoders

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}


def t5gemma(zoo):
    part = zoo.COMMON | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}
    return transformers.T5GemmaConfig(encoder=part, decoder=part, vocab_size=96)


CONFIGS = {
    "ModernBertModel": lambda zoo: transformers.ModernBertConfig(**SIZES, intermediate_size=48),
    "RoFormerModel": lambda zoo: transformers.RoFormerConfig(**SIZES, intermediate_size=48),
    "EuroBertModel": lambda zoo: transformers.EuroBertConfig(**SIZES, intermediate_size=48),
    "LlamaModel": lambda zoo: transformers.LlamaConfig(**zoo.COMMON),
    "LlamaForSequenceClassification": lambda zoo: transformers.LlamaConfig(**zoo.COMMON),
    "T5ForConditionalGeneration": lambda zoo: transformers.T5Config(**T5, decoder_start_token_id=1),
    "T5GemmaForConditionalGeneration": t5gemma,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_encoders_and_other_heads(name, zoo):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, name)(CONFIGS[name](zoo))
        for parameter in (p for p in model.parameters() if p.requires_grad):  # tables of sines are not
            noise = torch.randn_like(parameter)
            parameter.data = parameter + 0.3 * noise if parameter.ndim < 2 else noise * parameter.shape[-1] ** -0.5
    model.eval()
    ids = zoo.token_ids()
    whole, mask = padded(ids)
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}

    @torch.no_grad()
    def differences():
        alone, padded_rows = (
            model(input_ids=ids, **decoder)[0],
            model(input_ids=whole, attention_mask=mask, **decoder)[0],
        )
        yield (padded_rows[:, -alone.shape[1] :] - alone).abs().max().item()
        if decoder:
            of_decoder = model(input_ids=ids, decoder_input_ids=whole, decoder_attention_mask=mask)[0]
            yield (of_decoder[:, FRONT:] - alone).abs().max().item()

    assert max(differences()) < ROUNDING
    parscale.wrap(model, 3, prefix_length=4, init="random")
    zoo.fill_streams(model)
    assert max(differences()) < 2 * ROUNDING
