"""Encoder outputs that are given: encoded once, decoded at once or later, by one row or many, by the same streams."""

import copy
import dataclasses
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

import parscale
from parscale.hooks.encoded import EncodedRows, Mark, by_source, marked

P, B, S, TOLERANCE = 3, 2, 9, 2e-5  # as in test_families.py
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
BART = TOKENS | {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
}
T5 = TOKENS | {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BERT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LED = {name: value for name, value in BART.items() if name != "max_position_embeddings"}
LED |= {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 4}
PROPHET_NET = TOKENS | {
    "vocab_size": 96,
    "hidden_size": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "max_position_embeddings": 64,
}
WHISPER = BART | {
    "max_source_positions": 10,
    "max_target_positions": 64,
    "num_mel_bins": 8,
    "begin_suppress_tokens": None,
}
DECODING = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def ids(rows: int = B, length: int = S, seed: int = 2) -> torch.Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def text() -> dict[str, torch.Tensor]:
    return {"input_ids": ids()}


def picture() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(B, 3, 8, 8, generator=torch.Generator().manual_seed(4))}


def sound() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(B, 8, 20, generator=torch.Generator().manual_seed(4))}


def pair(kind: str, encoder: Any) -> Callable[[], Any]:
    """A model of an encoder and a decoder, each with a configuration of its own."""

    def make() -> Any:
        decoder = transformers.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
        config = getattr(transformers, f"{kind}Config").from_encoder_decoder_configs(encoder, decoder)
        config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = 0, 2, 1
        return getattr(transformers, f"{kind}Model")(config)

    return make


def of(name: str, config: str, options: dict[str, Any]) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(getattr(transformers, f"{config}Config")(**options))


@dataclasses.dataclass(frozen=True)
class Kind:
    """How to make a model, what its encoder reads, its transform, and what its plain class does not do."""

    make: Callable[[], Any]
    source: Callable[[], dict[str, torch.Tensor]] = text
    transform: str = "prefix"
    without: tuple[str, ...] = ()


KINDS = {
    "T5": Kind(of("T5ForConditionalGeneration", "T5", T5)),
    "Bart": Kind(of("BartForConditionalGeneration", "Bart", BART)),
    "MBart": Kind(of("MBartForConditionalGeneration", "MBart", BART)),
    "Marian": Kind(of("MarianMTModel", "Marian", BART)),
    "Pegasus": Kind(of("PegasusForConditionalGeneration", "Pegasus", BART), transform="lora"),
    "M2M100": Kind(of("M2M100ForConditionalGeneration", "M2M100", BART)),
    "LED": Kind(of("LEDForConditionalGeneration", "LED", LED), transform="lora"),
    "ProphetNet": Kind(
        of("ProphetNetForConditionalGeneration", "ProphetNet", PROPHET_NET), transform="lora", without=("tuple",)
    ),
    "EncoderDecoder": Kind(pair("EncoderDecoder", transformers.BertConfig(**BERT))),
    "VisionEncoderDecoder": Kind(
        pair("VisionEncoderDecoder", transformers.ViTConfig(**BERT, image_size=8, patch_size=4)), picture
    ),
    "Whisper": Kind(
        of("WhisperForConditionalGeneration", "Whisper", WHISPER), sound, without=("num_return_sequences",)
    ),
}


def plain(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = KINDS[name].make()
        for parameter in model.parameters():
            with torch.no_grad():
                draw = torch.randn_like(parameter)
                if parameter.ndim > 1:
                    parameter.copy_(draw * parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(draw, alpha=0.3)
    return model.eval()


def with_no_difference(model: Any) -> Any:
    """Streams that are the backbone, each of them: a low-rank difference starts as none."""
    with torch.enable_grad():
        return parscale.wrap(model, P, transform="lora", seed=0)


def fill(model: Any, name: str = "default", seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for own, parameter in model.parscale.tensors(model.parscale.sets[name]).items():
            scale = 1.0 if ".prefix_" in own else 0.5 * parameter.shape[-1] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(name: str) -> Any:
    options = {"prefix_length": 4, "rank": 3, "init": "random", "seed": 0, "transform": KINDS[name].transform}
    with torch.enable_grad():
        model = parscale.wrap(plain(name), P, **options)
        model.add_streams("other", 2, **options)
    fill(model)
    return model


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def rows_of(source: dict[str, torch.Tensor], index: Any) -> dict[str, torch.Tensor]:
    return {name: value[index] for name, value in source.items()}


def test_however_it_is_handed_on(name, model, zoo):
    source, targets = KINDS[name].source(), ids(length=7, seed=3)
    expected = model(**source, decoder_input_ids=targets).logits
    encoded = model.get_encoder()(**source)
    assert encoded[0].shape[0] == P * B
    states, saved = encoded[0], io.BytesIO()
    torch.save(states, saved)
    saved.seek(0)
    ways = {
        "as it is": encoded,
        "anew": BaseModelOutput(last_hidden_state=states),
        "moved and cast": BaseModelOutput(last_hidden_state=states.to("cpu", torch.float64).float()),
        "sliced": BaseModelOutput(last_hidden_state=states[:, :100].clone().detach().contiguous()),
        "copied": copy.deepcopy(encoded),
        "saved": BaseModelOutput(last_hidden_state=torch.load(saved)),
        "tuple": (states,),
    }
    for way in ways.keys() - KINDS[name].without:
        result = model(encoder_outputs=ways[way], decoder_input_ids=targets)[0]
        assert torch.equal(result, expected), way


@pytest.mark.grid
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_generation(name, model, options):
    if options.keys() & set(KINDS[name].without):
        return
    source, scored = KINDS[name].source(), {"return_dict_in_generate": True, "output_scores": True}
    for chosen in ("default", None):
        with model.use_streams(chosen):
            expected = model.generate(*source.values(), **DECODING, **options, **scored)
            first = expected["scores"][0]
            assert (first[0] - first[-1]).nan_to_num(0.0).abs().max() > 1e-2  # of another source
            encoded = model.get_encoder()(**source)
            for given in (encoded, BaseModelOutput(last_hidden_state=encoded[0].clone())):
                result = model.generate(encoder_outputs=given, **DECODING, **options, **scored)
                assert torch.equal(result["sequences"], expected["sequences"])
                assert torch.equal(torch.stack(result["scores"]), torch.stack(expected["scores"]))
            assert encoded[0].shape[0] == (B if chosen is None else P * B)


def test_one_source_and_several_targets(name, model, zoo):
    source, targets = KINDS[name].source(), ids(4, 7, seed=5)
    for index in (slice(0, 1), slice(1, 2)):
        encoded = model.get_encoder()(**rows_of(source, index))
        expected = model(
            **{key: value.expand(4, *value.shape[1:]) for key, value in rows_of(source, index).items()},
            decoder_input_ids=targets,
        ).logits
        zoo.close(model(encoder_outputs=encoded, decoder_input_ids=targets).logits, expected, TOLERANCE)
    encoded = model.get_encoder()(**source)
    twice = BaseModelOutput(last_hidden_state=encoded[0].repeat_interleave(2, dim=0))
    if name == "ProphetNet":  # its own class of outputs, which one of this library's models builds on
        twice = type(encoded)(last_hidden_state=twice[0])
    expected = model(
        **{key: value.repeat_interleave(2, dim=0) for key, value in source.items()}, decoder_input_ids=targets
    ).logits
    zoo.close(model(encoder_outputs=twice, decoder_input_ids=targets).logits, expected, TOLERANCE)
    with pytest.raises(ValueError, match=r"has 2 sources with 3 streams each, for 3 rows.*repeat_interleave"):
        model(encoder_outputs=encoded, decoder_input_ids=targets[:3])


def test_what_the_plain_encoder_made_is_for_all_streams(name, zoo):
    backbone, source, targets = plain(name), KINDS[name].source(), ids(length=7, seed=3)
    expected = backbone(**source, decoder_input_ids=targets).logits
    encoded = backbone.get_encoder()(**source)
    one = backbone.get_encoder()(**rows_of(source, slice(0, 1)))
    model = with_no_difference(plain(name))
    zoo.close(model(encoder_outputs=encoded, decoder_input_ids=targets).logits, expected, TOLERANCE)
    same = backbone(
        **{key: value[:1].expand(B, *value.shape[1:]) for key, value in source.items()}, decoder_input_ids=targets
    ).logits
    zoo.close(model(encoder_outputs=one, decoder_input_ids=targets).logits, same, TOLERANCE)
    with model.use_streams(None):
        encoded = model.get_encoder()(**source)
    zoo.close(model(encoder_outputs=encoded, decoder_input_ids=targets).logits, expected, TOLERANCE)
    generated = model.generate(encoder_outputs=encoded, **DECODING)
    assert torch.equal(generated, backbone.generate(*source.values(), **DECODING))
    with pytest.raises(ValueError, match=r"encoder_hidden_states.*2 rows.*5 rows of input|5 rows of input"):
        model(encoder_outputs=encoded, decoder_input_ids=ids(5, 7))


def test_another_set_or_none_says_who_encoded(name, model):
    source, targets = KINDS[name].source(), ids(length=7, seed=3)
    encoded = model.get_encoder()(**source)
    for chosen in ("other", None):
        with model.use_streams(chosen):
            for run in (
                lambda: model(encoder_outputs=encoded, decoder_input_ids=targets),
                lambda: model.generate(encoder_outputs=encoded, **DECODING),
            ):
                with pytest.raises(ValueError, match=r"was encoded with streams 'default', P = 3, but .* is active"):
                    run()


@pytest.mark.parametrize("name", ["T5", "EncoderDecoder"], indirect=True)
def test_rows_that_lost_their_streams_are_refused(name, model):
    """As many rows as streams and sources, or as many as there are targets, but of one stream or in another order."""
    states = model.get_encoder()(**KINDS[name].source())[0]
    for chosen in (
        states[:B],
        states[[1, 0, 2, 3, 4, 5]],
        states[..., torch.arange(6), :, :],
        states.flip(0),
        torch.flip(states, (0,)),
        states.flipud(),
        states.roll(3, 0),
        torch.roll(states, 1, 0),
        states.index_select(0, torch.arange(6)),
        torch.index_select(states, dim=0, index=torch.arange(6)),
        states.gather(0, torch.zeros_like(states, dtype=torch.long)),
        states.take_along_dim(torch.arange(6).view(-1, 1, 1), 0),
        states.sort(0).values,
        (torch.eye(6) @ states.flatten(1)).view(states.shape),
        torch.einsum("rq,qsh->rsh", torch.eye(6), states),
        states + states.flip(0),
        torch.cat([states[:3], states[3:]]),
        states.repeat(2, 1, 1),
        states.repeat_interleave(torch.tensor([2, 1, 1, 1, 1, 1]), dim=0),
        states[0],
    ):
        for run in (
            lambda states=chosen: model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states), decoder_input_ids=ids(length=7)
            ),
            lambda states=chosen: model.generate(encoder_outputs=BaseModelOutput(last_hidden_state=states), **DECODING),
        ):
            with pytest.raises(ValueError, match=r"choosing, moving or joining its rows.*get_encoder"):
                run()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.flip(1),
        lambda x: torch.flip(x, (1, 2)),
        lambda x: x.index_select(1, torch.arange(2)),
        lambda x: torch.index_select(x, dim=-1, index=torch.arange(2)),
        lambda x: x.roll(1, dims=1),
        lambda x: x.repeat_interleave(repeats=2, dim=0),
        lambda x: torch.repeat_interleave(x, 2, dim=0),
        lambda x: x.repeat_interleave(torch.tensor([1, 2, 0, 1]), dim=1),
        lambda x: torch.cat([x, x], dim=1).chunk(2, dim=1)[0],
        lambda x: x[..., :2] + x[:, [0, 2, 1, 3], None].squeeze(2)[..., 2:4],
        lambda x: x.flatten(1) @ torch.ones(32, 4),
        lambda x: nn.functional.linear(2 * x.to(torch.float64), torch.ones(4, 8).double()),
        lambda x: nn.Dropout(0.5)(torch.tanh(1 - x)).masked_fill(x > 0, 0.0),
    ],
)
def test_functions_that_move_no_row_keep_the_mark(function):
    assert function(marked(torch.randn(6, 4, 8), Mark("default", P))).mark.ordered


OTHERS = torch.arange(6 * 4 * 8.0).view(6, 4, 8)
BACK = torch.arange(5, -1, -1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.copy_(x.flip(0)),
        lambda x: x.index_copy_(0, BACK, OTHERS),
        lambda x: x.index_add_(0, BACK, x.clone()),
        lambda x: x.scatter_(0, BACK.view(-1, 1, 1).expand_as(OTHERS), OTHERS),
        lambda x: x.masked_scatter_(OTHERS > 9, OTHERS),
        lambda x: x.add_(x.flip(0)),
        lambda x: x.swapaxes_(0, 1),
        lambda x: x.__setitem__(slice(None), x.flip(0)),
        lambda x: x.__setitem__([0, 1], x[[1, 0]]),
        lambda x: x.__setitem__(slice(3), OTHERS[3:]),
        lambda x: x.__setitem__(0, OTHERS[1]),
        lambda x: torch.index_select(OTHERS, 0, BACK, out=x),
        lambda x: torch.index_select(marked(OTHERS, x.mark), 0, BACK, out=x),
        lambda x: torch.sort(OTHERS, 0, out=(x, torch.empty(OTHERS.shape, dtype=torch.long))),
    ],
)
def test_rows_moved_in_place_lose_their_streams(function):
    x = marked(OTHERS.clone(), Mark("default", P))
    function(x)
    assert x.mark == Mark("default", P, ordered=False)
    x.mul_(2)  # nor does it come back
    assert not x.mark.ordered
    with pytest.raises(ValueError, match=r"choosing, moving or joining its rows.*get_encoder"):
        by_source(x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mul_(2).add_(x.clone()).clamp_(max=100.0),
        lambda x: x.copy_(2 * x),
        lambda x: x[:, 2:].zero_(),
        lambda x: x.__setitem__((slice(None), 0), x[:, 1]),
        lambda x: x.__setitem__((..., slice(3)), 0.0),
        lambda x: x.__setitem__(OTHERS > 9, torch.tensor(0.0)),
        lambda x: x.__setitem__(2, 0),
        lambda x: torch.add(x, 1, out=x),
        lambda x: torch.mul(marked(OTHERS, x.mark), 2, out=x),
        lambda x: nn.functional.relu(x, inplace=True).requires_grad_(False),
    ],
)
def test_what_is_written_in_place_row_by_row_keeps_the_mark(function):
    x = marked(OTHERS.clone(), Mark("default", P))
    function(x)
    assert x.mark == Mark("default", P)


def test_streams_chosen_from_rows_by_source():
    rows = by_source(marked(torch.randn(6, 4, 8), Mark("default", P)))
    assert rows[:1].mark.ordered
    assert not rows[:, :, :2].mark.ordered


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("name", ["T5", "Whisper"], indirect=True)
def test_compiled(name, model, zoo):
    source = KINDS[name].source()
    targets = {"decoder_input_ids": ids(length=7, seed=3), "use_cache": False}
    expected = model(**source, **targets).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    zoo.close(compiled(**source, **targets).logits, expected, TOLERANCE)
    encoded = torch.compile(model.get_encoder(), fullgraph=True, backend="aot_eager")(**source)
    assert torch.equal(encoded[0], model.get_encoder()(**source)[0])
    result = model(encoder_outputs=encoded, **targets).logits
    zoo.close(result, expected, TOLERANCE)
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["T5"], indirect=True)
def test_gradients_reach_what_encoded(name, model):
    source, targets = KINDS[name].source(), ids(length=7, seed=3)
    gradients = []
    for outside in (False, True):
        model.zero_grad()
        with torch.enable_grad():
            given = {"encoder_outputs": model.get_encoder()(**source)} if outside else source
            model(**given, decoder_input_ids=targets, labels=targets).loss.backward()
        gradients.append({own: parameter.grad for own, parameter in model.named_parameters()})
    model.zero_grad()
    with torch.enable_grad():  # of what a caller holds, too
        output = model(**source, decoder_input_ids=targets, output_hidden_states=True)
        held = [*output.encoder_hidden_states, output.encoder_last_hidden_state]
        for states in held:
            states.retain_grad()
        output.logits.sum().backward()
    assert all(states.grad is not None and states.grad.any() for states in held)
    encoder = [own for own in gradients[0] if own.startswith("encoder.") and "prefix_" in own and "@" not in own]
    assert encoder
    assert all(torch.equal(gradients[0][own], gradients[1][own]) and gradients[0][own].any() for own in encoder)


@pytest.mark.parametrize("name", ["Bart"], indirect=True)
def test_an_assistant_without_an_encoder_is_refused(name, model):
    assistant = transformers.BartForCausalLM(transformers.BartConfig(**BART)).eval()
    source = ids(1)
    with pytest.raises(ValueError, match=r"BartForCausalLM has no encoder.*3 rows for each source"):
        model.generate(source, assistant_model=assistant, **DECODING)
    twin = plain(name)  # one with an encoder of its own reads the source itself
    expected = model.generate(source, **DECODING)
    assert torch.equal(model.generate(source, assistant_model=twin, **DECODING), expected)


def test_a_decoder_that_reads_the_states_of_another_model(zoo):
    """Cross-attention without an encoder of its own: states with B rows, or with one for all."""
    config = transformers.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    torch.manual_seed(0)
    backbone = transformers.BertLMHeadModel(config).eval()
    states = torch.randn(B, 5, 32)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    model = with_no_difference(copy.deepcopy(backbone))
    for given in ({"encoder_attention_mask": mask}, {}):
        expected = backbone(ids(), encoder_hidden_states=states, **given).logits
        zoo.close(model(ids(), encoder_hidden_states=states, **given).logits, expected, TOLERANCE)
    expected = backbone(ids(), encoder_hidden_states=states[:1].expand(B, -1, -1)).logits
    zoo.close(model(ids(), encoder_hidden_states=states[:1]).logits, expected, TOLERANCE)


def test_a_mark_is_no_part_of_what_the_model_gives(zoo):
    model = parscale.wrap(plain("T5"), P, prefix_length=4, init="random", seed=0)
    output = model(**text(), decoder_input_ids=ids(length=7), output_hidden_states=True)
    assert type(output.logits) is torch.Tensor
    assert all(type(states) is torch.Tensor for states in output.decoder_hidden_states)
    cache = output.past_key_values.cross_attention_cache.layers[0]
    assert type(cache.keys) is torch.Tensor
    assert isinstance(output.encoder_last_hidden_state, EncodedRows)
    parscale.unwrap(model)
    assert "generate" not in vars(model)
    assert type(model.get_encoder()(**text())[0]) is torch.Tensor
