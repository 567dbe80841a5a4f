"""Encoders of a text and of something else side by side: both have streams, and each is mixed by its own aggregator."""

import re
from types import SimpleNamespace

import pytest
import torch
import transformers

import parscale
from parscale.streams.backbones import masking_noise

P, T, TOLERANCE = 3, 4, 2e-5  # as in test_kinds.py
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = SIZES | {
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IMAGES = SIZES | {"image_size": 8, "patch_size": 4}
TOWERS = {
    "CLIPModel": {"projection_dim": 16},
    "SiglipModel": {},
    "AltCLIPModel": {"projection_dim": 16},
    "ChineseCLIPModel": {"projection_dim": 16},
    "CLIPSegModel": {"projection_dim": 16},
    "MetaClip2Model": {"projection_dim": 16},
    "OwlViTModel": {"projection_dim": 16},
}


def plain(name):
    options = TOWERS[name]
    text = TEXT | {"projection_dim": 16} if options else TEXT
    if name == "SiglipModel":
        text = text | {"projection_size": 32}
    config = getattr(transformers, name).config_class(text_config=text, vision_config=IMAGES | options, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, name)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                draw = torch.randn_like(parameter)
                if parameter.ndim < 2:
                    parameter.add_(draw, alpha=0.3)
                else:
                    parameter.copy_(draw * parameter[0].numel() ** -0.5)
    return model.eval()


def pair(rows=2):
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 96, (rows, 9), generator=generator)
    ids[:, -1] = 2
    return {"input_ids": ids, "pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}


@torch.no_grad()
def fill(model, seed=1):
    """The same numbers for the same names, whatever else the model has."""
    for name, parameter in sorted(model.parscale.tensors(model.parscale.active).items()):
        generator = torch.Generator().manual_seed(seed + sum(map(ord, re.sub(r"^(text|vision)_model\.", "", name))))
        scale = 1.0 if ".prefix_" in name else 0.5 * parameter.shape[-1] ** -0.5
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def wrapped(name, **options):
    return fill(parscale.wrap(plain(name), P, prefix_length=T, seed=0, **options))


@pytest.fixture(params=TOWERS)
def name(request):
    return request.param


def test_each_tower_is_as_if_it_were_wrapped_alone(name, zoo):
    model, apart = wrapped(name), plain(name)
    for tower in (apart.text_model, apart.vision_model):
        fill(parscale.wrap(tower, P, prefix_length=T))
    with torch.no_grad():
        together, found, before = model(**pair()), apart(**pair()), plain(name)(**pair())
    for key in ("text_embeds", "image_embeds", "logits_per_image", "logits_per_text"):
        assert together[key].shape == before[key].shape
        assert (together[key] - before[key]).abs().max() > 1e-3
        zoo.close(together[key], found[key], TOLERANCE)
    towers = {key.split(".")[0] for key, _ in model.named_parameters() if "aggregate_layer" in key}
    assert towers == {"text_model", "vision_model"}


@torch.no_grad()
def test_rows_do_not_mix(name, zoo):
    model, arguments = wrapped(name), pair(3)
    together = model(**arguments)
    for key in ("text_embeds", "image_embeds"):
        rows = [model(**{n: value[row : row + 1] for n, value in arguments.items()})[key] for row in range(3)]
        zoo.close(together[key], torch.cat(rows), TOLERANCE)
    alone = model.get_text_features(input_ids=arguments["input_ids"])
    assert getattr(alone, "pooler_output", alone).shape[0] == 3


def test_unwrapping_and_other_sets(name):
    arguments, model = pair(), wrapped(name)
    with torch.no_grad():
        expected, streams = plain(name)(**arguments), model(**arguments)
        model.set_streams(None)
        assert torch.equal(model(**arguments).image_embeds, expected.image_embeds)
        model.add_streams("pair", 2, prefix_length=3)
        model.set_streams("pair")
        assert not torch.equal(model(**arguments).image_embeds, expected.image_embeds)
        model.set_streams("default")
        assert torch.equal(model(**arguments).logits_per_image, streams.logits_per_image)
        parscale.unwrap(model)
        assert torch.equal(model(**arguments).logits_per_image, expected.logits_per_image)
    assert not [key for key, _ in model.named_parameters() if "aggregate_layer" in key or "prefix_" in key]


@pytest.mark.parametrize("transform", ["prefix", "lora"])
def test_loss_gradients_and_folders(transform, zoo, tmp_path):
    model, arguments = wrapped("CLIPModel", transform=transform, rank=2), pair()
    model.train()
    output = model(**arguments, return_loss=True)
    logits, own = output.logits_per_text, torch.arange(2)
    expected = sum(torch.nn.functional.cross_entropy(x, own) for x in (logits, logits.mT)) / 2
    zoo.close(output.loss, expected, 1e-6)
    output.loss.backward()
    assert all(x.grad is not None and x.grad.any() for x in model.parscale.tensors(model.parscale.active).values())
    model.eval()
    model.save_pretrained(tmp_path / "full")
    model.save_streams(tmp_path / "streams")
    for again in (
        parscale.load(tmp_path / "full"),
        transformers.AutoModel.from_pretrained(tmp_path / "full"),
        parscale.load(tmp_path / "streams", backbone=plain("CLIPModel")),
    ):
        with torch.no_grad():
            assert torch.equal(again(**arguments).logits_per_text, model(**arguments).logits_per_text)


def test_a_prompt_is_for_one_backbone():
    with pytest.raises(parscale.UnsupportedModelError, match="CLIPTextModel of CLIPModel does not, or not alone"):
        parscale.wrap(plain("CLIPModel"), 2, transform="prompt")


# -- images of which patches are hidden at random


def masked_autoencoder():
    config = transformers.ViTMAEConfig(
        **IMAGES,
        mask_ratio=0.5,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    torch.manual_seed(0)
    return transformers.ViTMAEForPreTraining(config).eval()


def test_all_streams_see_the_same_patches(zoo):
    """Streams that start as the backbone itself mix to it only if the same patches are hidden in each."""
    before, model = masked_autoencoder(), masked_autoencoder()
    parscale.wrap(model, P, transform="lora", rank=2, seed=0)
    images = pair(3)["pixel_values"]
    with torch.no_grad():
        for seed in range(3):
            torch.manual_seed(seed)
            expected = before(images)
            torch.manual_seed(seed)
            found = model(images)
            assert torch.equal(found.mask, expected.mask)
            assert torch.equal(found.ids_restore, expected.ids_restore)
            zoo.close(found.logits, expected.logits, TOLERANCE)
            zoo.close(found.loss, expected.loss, TOLERANCE)
        noise = torch.rand(3, 4)
        expected, found = before(images, noise=noise), model(images, noise=noise)
        zoo.close(found.logits, expected.logits, TOLERANCE)
        encoded = model.vit(images, noise=noise, return_dict=False)
        assert [tuple(x.shape) for x in encoded] == [(3, 3, 32), (3, 4), (3, 4)]
        assert torch.equal(encoded[1], expected.mask)


def test_patches_of_an_image_that_is_not_square():
    part = SimpleNamespace(config=SimpleNamespace(patch_size=(4, 2)))
    assert masking_noise(part, torch.zeros(3, 1, 8, 24)).shape == (3, 2 * 12)
