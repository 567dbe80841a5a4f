"""Encoders of text and images, and encoders with decoders: each stream by itself on the plain model, mixed by hand."""

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.masking_utils import eager_mask

import parscale
from parscale.format.architectures import architectures_in_checkpoints

P, T, TOLERANCE = 3, 4, 2e-5  # as in test_families.py
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 3,
}
PICTURES = {**SIZES, "image_size": 8, "patch_size": 4}
SWIN = {
    "image_size": 8,
    "patch_size": 1,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "window_size": 4,
    "num_labels": 3,
    "drop_path_rate": 0.0,
}
COMMON = {
    "vocab_size": 96,
    "d_model": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "tie_word_embeddings": False,
}
BART = COMMON | {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "forced_eos_token_id": None,
    "dropout": 0.0,
}
T5 = COMMON | {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
WHISPER = BART | {
    "max_source_positions": 10,
    "max_target_positions": 64,
    "num_mel_bins": 8,
    "begin_suppress_tokens": None,
}


def ids(rows=2, length=9, seed=2):
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def text(rows=2):
    return {"input_ids": ids(rows)}


def pictures(rows=2):
    return {"pixel_values": noise(rows, 3, 8, 8)}


def pair(rows=2):
    return {"input_ids": ids(rows), "decoder_input_ids": ids(rows, 7, seed=3)}


def sound(rows=2):
    return {"input_features": noise(rows, 8, 20), "decoder_input_ids": ids(rows, 7, seed=3)}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A class of models: its configuration's options, what it reads, and which `AutoModel...` makes it."""

    name: str
    config: str
    options: dict[str, Any]
    inputs: Callable[..., dict[str, torch.Tensor]]
    auto: str

    def plain(self) -> Any:
        config = getattr(transformers, f"{self.config}Config")(**self.options)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, self.name)(config)
            for name, parameter in model.named_parameters():
                with torch.no_grad():
                    draw = torch.randn_like(parameter)
                    if parameter.ndim < 2 or "embed_positions" in name:
                        parameter.add_(draw, alpha=0.3)
                    else:
                        parameter.copy_(draw * parameter[0].numel() ** -0.5)
        return model.eval()


KINDS = {
    kind.name: kind
    for kind in [
        Kind("BertForMaskedLM", "Bert", SIZES, text, "AutoModelForMaskedLM"),
        Kind("BertForSequenceClassification", "Bert", SIZES, text, "AutoModelForSequenceClassification"),
        Kind("BertModel", "Bert", SIZES, text, "AutoModel"),
        Kind("RobertaForMaskedLM", "Roberta", SIZES | {"max_position_embeddings": 66}, text, "AutoModelForMaskedLM"),
        Kind("RobertaForTokenClassification", "Roberta", SIZES, text, "AutoModelForTokenClassification"),
        Kind("ModernBertForMaskedLM", "ModernBert", SIZES | {"local_attention": 4}, text, "AutoModelForMaskedLM"),
        Kind("ModernBertForSequenceClassification", "ModernBert", SIZES, text, "AutoModelForSequenceClassification"),
        Kind("LlamaForSequenceClassification", "Llama", SIZES, text, "AutoModelForSequenceClassification"),
        Kind("LlamaModel", "Llama", SIZES, text, "AutoModel"),
        Kind("T5EncoderModel", "T5", T5, text, "AutoModelForTextEncoding"),
        Kind("ViTModel", "ViT", PICTURES, pictures, "AutoModel"),
        Kind("ViTForImageClassification", "ViT", PICTURES, pictures, "AutoModelForImageClassification"),
        Kind("Dinov2Model", "Dinov2", PICTURES, pictures, "AutoModel"),
        Kind("Dinov2ForImageClassification", "Dinov2", PICTURES, pictures, "AutoModelForImageClassification"),
        Kind("SwinForImageClassification", "Swin", SWIN, pictures, "AutoModelForImageClassification"),
        Kind("T5ForConditionalGeneration", "T5", T5, pair, "AutoModelForSeq2SeqLM"),
        Kind("BartForConditionalGeneration", "Bart", BART, pair, "AutoModelForSeq2SeqLM"),
        Kind("BartModel", "Bart", BART, pair, "AutoModel"),
        Kind("WhisperForConditionalGeneration", "Whisper", WHISPER, sound, "AutoModelForSpeechSeq2Seq"),
    ]
}
SEQUENCE_TO_SEQUENCE = [name for name, kind in KINDS.items() if "ForConditionalGeneration" in name]


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def wrapped(kind, transform="prefix"):
    model = kind.plain()
    parscale.wrap(model, P, prefix_length=T, rank=3, transform=transform)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in tensors_of(model).items():
            scale = 1.0 if ".prefix_" in name else 0.3 if parameter.ndim == 1 else 0.5 * parameter.shape[-1] ** -0.5
            scale = 3.0 * parameter.shape[-1] ** -0.5 if "aggregate" in name and parameter.ndim > 1 else scale
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def tensors_of(model):
    return model.parscale.tensors(model.parscale.active)


@torch.no_grad()
def result_of(model, **arguments):
    return model(**arguments)[0]


def attention_by_hand(module, query, key, value, mask, **kwargs):
    """Attention in float64 with `module.own_prefix`, two tensors `(G, T, D)`, which nothing hides."""
    keys, values = (
        torch.cat([prefix.expand(len(states), -1, -1, -1), states], dim=2).double()
        for prefix, states in zip(module.own_prefix, (key, value), strict=True)
    )
    scores = query.double() @ keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1).mT
    scores = scores * kwargs.get("scaling", query.shape[-1] ** -0.5)
    for bias in (mask, kwargs.get("position_bias")):
        if bias is not None:
            scores = scores + nn.functional.pad(bias.double(), (T, 0))
    values = values.repeat_interleave(query.shape[1] // values.shape[1], dim=1)
    return (scores.softmax(-1) @ values).transpose(1, 2).to(query.dtype), None


transformers.AttentionInterface.register("by_hand", attention_by_hand)
transformers.AttentionMaskInterface.register("by_hand", eager_mask)


@torch.no_grad()
def expected_of(kind, model, **arguments):
    """The plain model's output where its backbone gives what the streams, run one by one, mix to."""
    plain, tensors, hidden = kind.plain(), tensors_of(model), []
    for module in plain.modules():  # T5's encoder and decoder have configurations of their own
        if "config" in module.__dict__:
            module.config._attn_implementation = "by_hand"
    backbone = plain.get_submodule(model.parscale.backbone_name)
    pooler = getattr(backbone, "pooler", None)
    keep = backbone.register_forward_hook(lambda module, args, output: hidden.append(output[0].double()))
    for p in range(P):
        for name, key in tensors.items():
            if name.endswith(".prefix_k"):
                layer = plain.get_submodule(name.removesuffix(".prefix_k"))
                layer.own_prefix = key[p], tensors[name.removesuffix("k") + "v"][p]
        plain(**arguments)
    keep.remove()
    assert (hidden[0] - hidden[1]).abs().mean() > 0.01
    root = f"{model.parscale.backbone_name}.".lstrip(".") + "aggregate_layer."
    aggregator = {name.removeprefix(root): x.double() for name, x in tensors.items() if "aggregate_layer" in name}
    x = torch.stack(hidden, dim=-1)  # (B, S, H, P)
    inner = x.flatten(2) @ aggregator["0.weight"].T + aggregator["0.bias"]
    weights = (nn.functional.silu(inner) @ aggregator["2.weight"].T + aggregator["2.bias"]).softmax(-1)
    weights = 0.9 * weights + 0.1 / P
    mixed = (x * weights[:, :, None]).sum(-1).float()

    def replace(module, args, output):
        output.last_hidden_state = mixed
        if output.get("pooler_output") is not None:
            averages = isinstance(pooler, nn.AdaptiveAvgPool1d)  # of Swin
            pooled = mixed[:, 0] if pooler is None else pooler(mixed.mT).flatten(1) if averages else pooler(mixed)
            output.pooler_output = pooled
        return output

    backbone.register_forward_hook(replace)
    return plain(**arguments)


def test_each_stream_by_itself_then_the_mixture(kind, zoo):
    model = wrapped(kind)
    with torch.no_grad():
        output = model(**kind.inputs())
    expected = expected_of(kind, model, **kind.inputs())
    zoo.close(output[0], expected[0], TOLERANCE)
    if output.get("pooler_output") is not None:
        zoo.close(output.pooler_output, expected.pooler_output, TOLERANCE)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.inputs in (text, pair)])
def test_padding(name, zoo):
    kind = KINDS[name]
    model, arguments = wrapped(kind), kind.inputs()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    arguments |= {"attention_mask": mask, "input_ids": arguments["input_ids"].where(mask.bool(), 0)}
    result = result_of(model, **arguments)
    zoo.close(result, expected_of(kind, model, **arguments)[0], TOLERANCE)
    alone = {n: value[1:, :6] if n == "input_ids" else value[1:] for n, value in arguments.items()} | {
        "attention_mask": None
    }
    padded = result[1] if result.shape[1] in (3, 7) else result[1, :6]  # by label, by the decoder's token, by token
    zoo.close(padded, result_of(model, **alone)[0], TOLERANCE)


def test_rows_do_not_mix_and_tuples_are_the_same(kind, zoo):
    model, arguments = wrapped(kind), kind.inputs(3)
    together = result_of(model, **arguments)
    rows = [result_of(model, **{name: value[row : row + 1] for name, value in arguments.items()}) for row in range(3)]
    zoo.close(together, torch.cat(rows), TOLERANCE)
    with torch.no_grad():
        as_tuple = model(**arguments, return_dict=False)
    assert torch.equal(as_tuple[0], together)
    if kind.name in ("BertModel", "ViTModel", "Dinov2Model"):
        with torch.no_grad():
            assert torch.equal(as_tuple[1], model(**arguments).pooler_output)


def test_one_stream_and_unwrapping_change_nothing(kind):
    plain, arguments = kind.plain(), kind.inputs()
    expected = result_of(plain, **arguments)
    names = {name for name, _ in plain.named_parameters()}
    assert torch.equal(result_of(parscale.wrap(plain, 1), **arguments), expected)
    model = wrapped(kind)
    model.set_streams(None)
    assert torch.equal(result_of(model, **arguments), expected)
    parscale.unwrap(model)
    assert torch.equal(result_of(model, **arguments), expected)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()} == names


@pytest.mark.grid
@pytest.mark.parametrize("transform", ["prefix", "lora"])
def test_gradients_also_under_checkpointing(kind, zoo, transform):
    model, gradients = wrapped(kind, transform).train(), []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        result = model(**kind.inputs())[0]
        (result * noise(*result.shape)).sum().backward()
        gradients.append({name: tensor.grad.clone() for name, tensor in tensors_of(model).items()})
    assert all(gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        zoo.close(gradients[1][name], gradient, 1e-5 * max(1.0, gradient.abs().max().item()))


@pytest.mark.grid
@pytest.mark.parametrize("transform", ["prefix", "lora"])
def test_saved_and_loaded(kind, transform, tmp_path):
    model, arguments = wrapped(kind, transform), kind.inputs()
    expected = result_of(model, **arguments)
    model.save_pretrained(tmp_path / "full")
    (name,) = json.loads((tmp_path / "full" / "config.json").read_text())["architectures"]
    assert name in architectures_in_checkpoints()
    model.save_streams(tmp_path / "streams")
    parscale.unwrap(model).save_pretrained(tmp_path / "plain")
    for again in (
        parscale.load(tmp_path / "full"),
        getattr(transformers, kind.auto).from_pretrained(tmp_path / "full"),
        parscale.load(tmp_path / "streams", backbone=str(tmp_path / "plain")),
        parscale.load(tmp_path / "streams", backbone=kind.plain()),
    ):
        assert type(again).__name__ == kind.name
        assert torch.equal(result_of(again, **arguments), expected)


def test_another_task_is_refused(tmp_path):
    wrapped(KINDS["BertForMaskedLM"]).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"BertForMaskedLM with streams.*AutoModel does not read.*AutoModelForMaskedLM"
    ):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_lora_is_each_stream_with_its_own_weights(zoo):
    for name in ("BertForSequenceClassification", "BartForConditionalGeneration", "ViTForImageClassification"):
        kind = KINDS[name]
        model, arguments = wrapped(kind, "lora"), kind.inputs()
        with torch.no_grad():
            for module_name, tensor in tensors_of(model).items():  # all streams the same: then there is one
                if "stream_" in module_name:
                    tensor.copy_(tensor[:1].expand_as(tensor))
        plain = kind.plain()
        for module_name, down in tensors_of(model).items():
            if module_name.endswith("stream_down"):
                up = tensors_of(model)[module_name.removesuffix("down") + "up"]
                with torch.no_grad():
                    plain.get_submodule(module_name.removesuffix(".stream_down")).weight.add_(up[0] @ down[0])
        zoo.close(result_of(model, **arguments), result_of(plain, **arguments), TOLERANCE)


# -- encoders with decoders


@pytest.mark.grid
@pytest.mark.parametrize("transform", ["prefix", "lora"])
@pytest.mark.parametrize("name", SEQUENCE_TO_SEQUENCE)
def test_generation(name, transform):
    kind = KINDS[name]
    model, arguments = wrapped(kind, transform), kind.inputs()
    start = arguments.pop("decoder_input_ids")[:, :1]
    start = torch.full_like(start, model.config.decoder_start_token_id)
    source = next(iter(arguments.values()))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = start
    for _ in range(6):
        logits = result_of(model, **arguments, decoder_input_ids=expected, use_cache=False)[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    generated = model.generate(source, **options)
    assert torch.equal(generated[:, -6:], expected[:, -6:])
    assert len(set(map(tuple, expected.tolist()))) == 2
    beams = model.generate(source, num_beams=3, **options)
    assert torch.equal(beams, model.generate(source, num_beams=3, use_cache=False, **options))


@pytest.mark.parametrize("name", SEQUENCE_TO_SEQUENCE)
def test_encoded_once_decoded_later(name):
    kind = KINDS[name]
    model, arguments = wrapped(kind), kind.inputs()
    expected = result_of(model, **arguments)
    decoder_ids = arguments.pop("decoder_input_ids")
    with torch.no_grad():
        encoded = model.get_encoder()(**arguments)
    assert encoded[0].shape[0] == P * 2
    assert torch.equal(result_of(model, encoder_outputs=encoded, decoder_input_ids=decoder_ids), expected)


def test_loss_is_that_of_the_mixed_logits(zoo):
    for name in ("T5ForConditionalGeneration", "BertForMaskedLM"):
        kind = KINDS[name]
        model, arguments = wrapped(kind), kind.inputs()
        arguments.pop("decoder_input_ids", None)
        labels = ids(2, 7 if name.startswith("T5") else 9, seed=6)
        with torch.no_grad():
            output = model(**arguments, labels=labels)
        expected = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        zoo.close(output.loss, expected, 1e-6)


def test_what_is_for_models_that_write_text(tmp_path):
    model = wrapped(KINDS["BertForMaskedLM"])
    assert model.config.parscale_init == "random"
    with pytest.raises(ValueError, match="which BertForMaskedLM does not have"):
        model.stream_report(ids())
    plain = KINDS["T5ForConditionalGeneration"].plain()
    for init in ("context", "documents"):
        with pytest.raises(ValueError, match=r"T5ForConditionalGeneration is not one: omit it, or use init='random'"):
            parscale.wrap(copy.deepcopy(plain), 2, prefix_length=3, init=init)
    with pytest.raises(parscale.UnsupportedModelError, match=r"T5Stack of T5ForConditionalGeneration does not"):
        parscale.wrap(plain, 2, transform="prompt")


def test_a_prompt_in_front_of_an_encoder(zoo):
    """The first token's states, which a pooler takes, are those of the text's first token."""
    for name in ("BertForMaskedLM", "BertModel", "ModernBertForSequenceClassification"):
        kind = KINDS[name]
        model = wrapped(kind, "prompt")
        (prompt,) = model.parscale.active.transform.parameters()
        with torch.no_grad():
            prompt.copy_(prompt[:1].expand_as(prompt))
        plain, arguments = kind.plain(), kind.inputs()
        backbone = plain.get_submodule(model.parscale.backbone_name)
        embeddings = backbone.get_input_embeddings()(arguments["input_ids"])
        whole = torch.cat([prompt[:1].expand(2, -1, -1), embeddings], dim=1)
        with torch.no_grad():
            hidden = backbone(inputs_embeds=whole)[0][:, T:]
        handle = backbone.register_forward_hook(
            lambda module, args, output, hidden=hidden: replaced(module, output, hidden)
        )
        with torch.no_grad():
            expected, output = plain(**arguments), model(**arguments)
        handle.remove()
        zoo.close(output[0], expected[0], TOLERANCE)
        if name == "BertModel":
            zoo.close(output.pooler_output, expected.pooler_output, TOLERANCE)


def replaced(module, output, hidden):
    output.last_hidden_state = hidden
    if output.get("pooler_output") is not None:
        output.pooler_output = module.pooler(hidden)
    return output


def vision(kind, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **PICTURES, **changes)
    return transformers.AutoModel.from_config(config).eval()


@pytest.mark.parametrize("kind", ["vit", "dinov2", "bert"])
@pytest.mark.parametrize("as_dict", [True, False])
def test_all_hidden_states_are_the_plain_ones_where_streams_change_nothing(kind, as_dict):
    """The last one is the final state, or that before the final normalization; low-rank streams start at zero."""
    inputs = {"input_ids": torch.arange(3, 13).view(2, 5)} if kind == "bert" else pictures()
    plain, model = vision(kind), parscale.wrap(vision(kind), 2, transform="lora", rank=2, seed=0)
    with torch.no_grad():
        expected = plain(**inputs, output_hidden_states=True).hidden_states
        output = model(**inputs, output_hidden_states=True, return_dict=as_dict)
    found = output.hidden_states if as_dict else next(each for each in output if isinstance(each, tuple))
    assert len(found) == len(expected)
    for states, plain_states in zip(found, expected, strict=True):
        assert len(states) in (len(plain_states), 2 * len(plain_states))  # by stream, or mixed
        torch.testing.assert_close(states[: len(plain_states)], plain_states, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["CLIPTextModelWithProjection", "CLIPVisionModelWithProjection"])
def test_a_class_that_no_auto_class_reads_comes_back(name, tmp_path):
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    sizes = PICTURES | {"projection_dim": 16, "num_key_value_heads": 4}
    model = parscale.wrap(cls(cls.config_class(**sizes)).eval(), 2, prefix_length=3, init="random", seed=0)
    model.save_pretrained(tmp_path)
    again = parscale.load(tmp_path)
    assert type(again) is cls
    state = model.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())


def test_long_recordings_are_transcribed_in_pieces():
    """Of which one has more than another, so that fewer rows go on, with a mask of all."""

    def make():
        torch.manual_seed(0)
        config = transformers.WhisperConfig(**WHISPER)
        model = transformers.WhisperForConditionalGeneration(config).eval()
        model.generation_config.no_timestamps_token_id = 80
        return model

    length = 4 * WHISPER["max_source_positions"]
    sound = {"input_features": noise(2, 8, length), "attention_mask": torch.ones(2, length, dtype=torch.long)}
    sound["attention_mask"][1, length // 3 :] = 0
    options = {"return_timestamps": True, "max_new_tokens": 5, "do_sample": False}
    expected = make().generate(**sound, **options)
    model = parscale.wrap(make(), 2, transform="lora", rank=2, seed=0)  # streams that change nothing
    assert torch.equal(model.generate(**sound, **options), expected)
