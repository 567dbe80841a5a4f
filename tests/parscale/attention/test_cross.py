"""Prefixes in encoders with decoders, one or both of which take them from their cache: in each layer, cached or not."""

from typing import Any

import pytest
import torch
import transformers

import parscale
from parscale import UnsupportedModelError

P, B, TOLERANCE = 3, 2, 2e-5  # as in test_families.py
BERT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
BART = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "forced_eos_token_id": None,
}


def led() -> Any:
    sizes = {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 4}
    return transformers.LEDForConditionalGeneration(transformers.LEDConfig(**BART, **sizes))


def mvp() -> Any:
    return transformers.MvpForConditionalGeneration(transformers.MvpConfig(**BART, max_position_embeddings=64))


def text_config(name: str) -> Any:
    sizes = {"RoFormer": {"embedding_size": 32}, "RemBert": {"input_embedding_size": 16, "output_embedding_size": 24}}
    return getattr(transformers, f"{name}Config")(**BERT, **sizes.get(name, {}))


def pair(encoder: str, decoder: str) -> Any:
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(text_config(encoder), text_config(decoder))
    return transformers.EncoderDecoderModel(config)


def trocr() -> Any:
    picture = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    text = transformers.TrOCRConfig(
        vocab_size=96, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(picture, text)
    return transformers.VisionEncoderDecoderModel(config)


# the model, and the layers that attend: of LED's encoder none can, and a decoder's layer attends twice
KINDS = {
    "LED": (led, 2 * 2),
    "MVP": (mvp, 2 + 2 * 2),
    "RemBERT, RemBERT": (lambda: pair("RemBert", "RemBert"), 2 + 2 * 2),
    "RoFormer, RoFormer": (lambda: pair("RoFormer", "RoFormer"), 2 + 2 * 2),
    "BERT, RoFormer": (lambda: pair("Bert", "RoFormer"), 2 + 2 * 2),
    "RoFormer, BERT": (lambda: pair("RoFormer", "Bert"), 2 + 2 * 2),
    "ViT, TrOCR": (trocr, 2 + 2 * 2),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(kind: str, zoo: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = KINDS[kind][0]().eval()
        zoo.randomize(model)
    parscale.wrap(model, P, prefix_length=4, init="random", seed=0)
    zoo.fill_streams(model)
    return model


@pytest.fixture
def source(kind: str, zoo: Any) -> dict[str, torch.Tensor]:
    if kind == "ViT, TrOCR":
        return {"pixel_values": torch.randn(B, 3, 8, 8, generator=torch.Generator().manual_seed(4))}
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    return {"input_ids": zoo.token_ids() * mask, "attention_mask": mask}


def test_each_layer_has_a_prefix_that_counts(kind, model, source, zoo):
    prefixes = {own: x for own, x in model.named_parameters() if ".prefix_" in own}
    assert len(prefixes) == 2 * KINDS[kind][1]
    logits = model(**source, decoder_input_ids=zoo.token_ids(length=7, seed=3)).logits
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    silent = [own for own, x in prefixes.items() if x.grad is None or (x.grad.abs().amax((1, 2, 3)) < 1e-4).any()]
    assert not silent


@torch.no_grad()
def test_a_cache_changes_nothing(model, source, zoo):
    targets = zoo.token_ids(length=7, seed=3)
    expected = model(**source, decoder_input_ids=targets, use_cache=False).logits
    zoo.close(model(**source, decoder_input_ids=targets).logits, expected, TOLERANCE)
    encoded, cache, pieces = model.get_encoder()(**source), None, []
    mask = {name: value for name, value in source.items() if name == "attention_mask"}
    for piece in targets.split([4, 1, 2], dim=1):
        output = model(encoder_outputs=encoded, **mask, decoder_input_ids=piece, past_key_values=cache)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert cache.get_seq_length() == 7
    zoo.close(torch.cat(pieces, dim=1), expected, TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_text_is_the_same_without_a_cache(model, source, options):
    options = options | {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "decoder_start_token_id": 1}
    options |= {"pad_token_id": 0, "eos_token_id": 2}
    expected = model.generate(**source, **options, use_cache=False)
    assert torch.equal(model.generate(**source, **options), expected)


def test_a_decoder_without_a_place_is_refused(monkeypatch):
    """Prefixes in the encoder alone would not be those in each attention layer."""
    monkeypatch.setattr("parscale.attention.cache_seam._takes_cache", lambda module: False)
    with pytest.raises(UnsupportedModelError, match=r"the part TrOCR\w+ of VisionEncoderDecoderModel.*'lora' work"):
        parscale.wrap(trocr(), P, init="random")
    assert parscale.wrap(trocr(), P, transform="lora").num_streams == P
