"""Backbones that do something of their own: images among the text, layers that borrow keys, three kinds of position."""

import pytest
import torch
import transformers
from model_calls import choose_stream, given, logits_of
from transformers import DynamicCache

import parscale
from parscale.methods import adaptive_streams

TOLERANCE = 2e-4  # as in test_context.py
IMAGE = 92
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 93,
    "vision_start_token_id": 90,
    "vision_end_token_id": 91,
}
PIXELS = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def gemma3_with_images(zoo):
    text = zoo.COMMON | zoo.FAMILIES["gemma3"].options | {"sliding_window": 64}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=PIXELS,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=90,
        eoi_token_index=91,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen3_vl(zoo, stem="Qwen3VL", **options):
    text = zoo.COMMON | {"head_dim": 8, "rope_parameters": zoo.ROPE | {"mrope_section": [2, 1, 1]}} | options
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "patch_size": 4,
        "temporal_patch_size": 1,
        "spatial_merge_size": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    config = getattr(transformers, f"{stem}Config")(
        text_config=text,
        vision_config=vision,
        **QWEN_TOKENS,
    )
    return getattr(transformers, f"{stem}ForConditionalGeneration")(config)


def qwen3_vl_moe(zoo):
    return qwen3_vl(zoo, "Qwen3VLMoe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)


def qwen2_vl(zoo, stem="Qwen2VL"):
    text = zoo.COMMON | {"rope_parameters": zoo.ROPE | {"mrope_section": [2, 1, 1]}}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 1, "spatial_merge_size": 2}
    if stem == "Qwen2VL":
        vision |= {"embed_dim": 16, "hidden_size": 32}
    else:
        vision |= {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32, "window_size": 16}
        vision |= {"fullatt_block_indexes": [1]}
    config = getattr(transformers, f"{stem}Config")(
        text_config=text,
        vision_config=vision,
        **QWEN_TOKENS,
    )
    return getattr(transformers, f"{stem}ForConditionalGeneration")(config)


def qwen2_5_vl(zoo):
    return qwen2_vl(zoo, "Qwen2_5_VL")


def llava(zoo):
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**zoo.COMMON),
        vision_config=transformers.CLIPVisionConfig(**PIXELS | {"num_hidden_layers": 2}),
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def mllama(zoo):
    """Reads images in layers of cross-attention, which a text runs past."""
    text = zoo.COMMON | {"num_hidden_layers": 4, "cross_attention_layers": [1, 3], "rope_parameters": zoo.ROPE}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "vision_output_dim": 32,
        "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2]],
        "intermediate_layers_indices": [0],
    }
    config = transformers.MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    return transformers.MllamaForConditionalGeneration(config)


def gemma3n(zoo):
    kinds = ["sliding_attention", "full_attention"] * 3
    config = transformers.Gemma3nTextConfig(
        **zoo.COMMON | {"num_hidden_layers": 6},
        head_dim=8,
        num_kv_shared_layers=3,
        sliding_window=64,
        layer_types=kinds,
        vocab_size_per_layer_input=zoo.VOCABULARY,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 6,
    )
    return transformers.Gemma3nForCausalLM(config)


def gemma4(zoo):
    config = transformers.Gemma4TextConfig(
        **zoo.COMMON | {"num_hidden_layers": 4},
        head_dim=8,
        global_head_dim=16,
        num_kv_shared_layers=2,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=zoo.VOCABULARY,
        hidden_size_per_layer_input=8,
    )
    return transformers.Gemma4ForCausalLM(config)


def ministral3(zoo):
    """Scales its queries by the logarithm of their position, which a negative one has none of."""
    return transformers.Ministral3ForCausalLM(transformers.Ministral3Config(**zoo.COMMON, head_dim=8))


def llama4(zoo):
    """Attends within chunks; and `get_decoder` does not find its backbone."""
    config = transformers.Llama4TextConfig(
        **zoo.COMMON, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=64
    )
    return transformers.Llama4ForCausalLM(config)


def modernbert(zoo):
    """Calls its head `decoder`."""
    options = {name: value for name, value in zoo.COMMON.items() if name != "num_key_value_heads"}
    return transformers.ModernBertDecoderForCausalLM(
        transformers.ModernBertDecoderConfig(**options, local_attention=64)
    )


def diffllama(zoo):
    """Calls attention twice in each layer, with the same keys and other values."""
    return transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**zoo.COMMON))


def build(make, zoo):
    """The same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            model = make(zoo)
        except AttributeError as error:
            if not str(error).startswith("module transformers has no attribute"):
                raise
            pytest.skip(str(error))  # an older transformers
        zoo.randomize(model)
    return model.eval()


def picture_inputs(make, zoo, rows):
    """Ids `(rows, 9)` with an image of four tokens in each row, after a text if given, and what else is needed."""
    ids = zoo.token_ids(rows).clamp(max=89)
    ids[:, 1] = 90
    ids[:, 2:6] = IMAGE
    pixels = torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def arguments(text=None):
        whole = ids if text is None else torch.cat([text.expand(rows, -1), ids], dim=1)
        if make is llava:
            return {"input_ids": whole, "pixel_values": pixels}
        if make is gemma3_with_images:
            return {"input_ids": whole, "pixel_values": pixels, "token_type_ids": (whole == IMAGE).long()}
        if make is mllama:  # two tiles; the tokens before the image do not see it
            sees = (whole == IMAGE).cummax(dim=1).values.long()
            return {
                "input_ids": whole,
                "pixel_values": torch.stack([pixels, -pixels], dim=1)[:, None],
                "aspect_ratio_ids": torch.full((rows, 1), 2),
                "aspect_ratio_mask": torch.ones(rows, 1, 2, dtype=torch.long),
                "cross_attention_mask": sees[:, :, None, None].expand(-1, -1, 1, 2),
            }
        grid = torch.tensor([[1, 4, 4]] * rows)
        patches = (
            pixels.repeat(1, 1, 2, 2).unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(rows * 16, -1)
        )
        return {
            "input_ids": whole,
            "pixel_values": patches,
            "image_grid_thw": grid,
            "mm_token_type_ids": (whole == IMAGE).long(),
        }

    return arguments


@pytest.mark.grid
@pytest.mark.parametrize("make", [gemma3_with_images, llava, qwen2_vl, qwen2_5_vl, qwen3_vl])
@pytest.mark.parametrize("rows", [1, 3])
def test_images_among_the_text(make, rows, zoo, tmp_path):
    """Each stream by itself is the backbone that reads a text, then text and image; and rows keep their own image."""
    plain, model, arguments = build(make, zoo), build(make, zoo), picture_inputs(make, zoo, rows)
    texts = zoo.token_ids(3, 6, seed=8).clamp(max=89)
    parscale.wrap(model, 3, prefix_length=6, smoothing=0.0, init="context", calibration=texts)
    for p, text in enumerate(texts):
        choose_stream(model, p)
        zoo.close(
            logits_of(model, **arguments()),
            logits_of(plain, **arguments(text))[:, 6:],
            TOLERANCE,
        )
    zoo.fill_streams(model)
    other = arguments()
    other["pixel_values"] = other["pixel_values"] + 1.0
    assert (logits_of(model, **other) - logits_of(model, **arguments())).abs().max() > 1e-2
    expected = logits_of(model, **arguments())
    generated = model.generate(**arguments(), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert torch.equal(generated[:, 9], expected[:, -1].index_fill(1, torch.tensor([2]), -torch.inf).argmax(-1))
    model.save_pretrained(tmp_path)
    again = parscale.load(tmp_path)
    assert type(again) is type(model)
    zoo.close(logits_of(again, **arguments()), expected, 1e-6)
    model.set_streams(None)
    assert torch.equal(logits_of(model, **arguments()), logits_of(plain, **arguments()))


@pytest.mark.parametrize("transform", ["prefix", "prompt", "lora"])
def test_layers_that_read_images_by_cross_attention(transform, zoo):
    """Every stream has the row's own image; a low-rank difference starts as none, so that it is the backbone."""
    arguments = picture_inputs(mllama, zoo, 3)()
    arguments["pixel_values"] = arguments["pixel_values"] * torch.tensor([1.0, -2.0, 3.0]).view(3, 1, 1, 1, 1, 1)
    plain, model = build(mllama, zoo), build(mllama, zoo)
    parscale.wrap(model, 3, prefix_length=4, init="random", seed=0, transform=transform)
    if transform == "lora":
        zoo.close(logits_of(model, **arguments), logits_of(plain, **arguments), 2e-5)
    zoo.fill_streams(model)
    together = logits_of(model, **arguments)
    alone = [logits_of(model, **{name: value[b : b + 1] for name, value in arguments.items()}) for b in range(3)]
    zoo.close(together, torch.cat(alone), 2e-5)
    assert (
        together - logits_of(model, **arguments | {"pixel_values": arguments["pixel_values"] + 1})
    ).abs().max() > 0.1
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "inputs": arguments.pop("input_ids")}
    written = model.generate(**options, **arguments)
    assert torch.equal(written, model.generate(**options, **arguments, use_cache=False))
    assert torch.equal(written[:, 9], together[:, -1].index_fill(1, torch.tensor([2]), -torch.inf).argmax(-1))


@pytest.mark.parametrize("make", [ministral3, llama4, modernbert])
def test_backbones_with_a_way_of_their_own(make, zoo):
    plain, model = build(make, zoo), build(make, zoo)
    texts, ids = zoo.token_ids(3, 6, seed=8), zoo.token_ids()
    parscale.wrap(model, 3, prefix_length=6, smoothing=0.0, init="context", calibration=texts)
    for p, text in enumerate(texts):
        choose_stream(model, p)
        expected = logits_of(plain, torch.cat([text.expand(zoo.B, -1), ids], dim=1))[:, 6:]
        zoo.close(logits_of(model, ids), expected, TOLERANCE)
    parscale.unwrap(model)
    assert torch.equal(logits_of(model, ids), logits_of(plain, ids))


def test_one_prefix_for_two_runs_of_attention_is_an_approximation(zoo):
    model = build(diffllama, zoo)
    with pytest.warns(UserWarning, match="more than once.*approximation"):
        parscale.wrap(model, 2, prefix_length=6, init="context", seed=0)
    assert logits_of(model, zoo.token_ids()).isfinite().all()


@pytest.mark.parametrize("make", [gemma3n, gemma4])
def test_a_layer_that_borrows_keys_borrows_their_prefix(make, zoo):
    plain, model = build(make, zoo), build(make, zoo)
    texts, ids = zoo.token_ids(3, 6, seed=8), zoo.token_ids()
    parscale.wrap(model, 3, prefix_length=6, smoothing=0.0, init="context", calibration=texts)
    owners = {name.split(".self_attn.")[0] for name, _ in model.named_parameters() if "prefix_" in name}
    assert len(owners) == model.config.num_hidden_layers - model.config.num_kv_shared_layers
    for p, text in enumerate(texts):
        choose_stream(model, p)
        expected = logits_of(plain, torch.cat([text.expand(zoo.B, -1), ids], dim=1))[:, 6:]
        zoo.close(logits_of(model, ids), expected, TOLERANCE)
    zoo.fill_streams(model)
    full, cache = logits_of(model, ids), DynamicCache(config=model.config)
    decoded = [logits_of(model, piece, cache=cache) for piece in ids.split([3, 1, 1, 4], dim=1)]
    zoo.close(torch.cat(decoded, dim=1), full, 2e-5)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if "prefix_" in name)
    parscale.unwrap(model).eval()
    assert torch.equal(logits_of(model, ids), logits_of(plain, ids))
    assert not any(type(module.__dict__.get("config")).__name__ == "AttentionConfig" for module in model.modules())


def test_every_part_of_a_configuration_is_the_models_own(zoo):
    plain = build(gemma3_with_images, zoo)
    model = transformers.Gemma3ForConditionalGeneration(plain.config).eval()
    assert model.config is plain.config
    parscale.wrap(model, 2, prefix_length=3, init="random")
    assert model.config is not plain.config
    assert model.config.text_config is not plain.config.text_config
    assert model.get_decoder().config is model.config.text_config
    model.set_attn_implementation("eager")
    assert plain.config.text_config._attn_implementation == "sdpa"
    assert not hasattr(plain.config, "parscale_n")
    assert model.config.parscale_n == 2


def fuyu(zoo):
    """Its outer module counts positions, padding or not."""
    text = zoo.COMMON | {"num_key_value_heads": 4}
    return transformers.FuyuForCausalLM(transformers.FuyuConfig(text_config=text, **text))


@pytest.mark.parametrize("make", [gemma3_with_images, qwen2_vl, qwen3_vl, llava, fuyu], ids=lambda make: make.__name__)
def test_left_padding_without_positions(make, zoo):
    """Also where the module around the backbone makes its masks and its positions."""
    model = build(make, zoo)
    own = {"input_ids": zoo.token_ids()} if make is fuyu else picture_inputs(make, zoo, 2)()
    ids, by_token = own["input_ids"], ("input_ids", "token_type_ids", "mm_token_type_ids")
    front = torch.zeros(2, 3, dtype=torch.long)
    padded = {k: torch.cat([front, v], dim=1) if k in by_token else v for k, v in own.items()}
    padded["attention_mask"] = torch.cat([front, torch.ones_like(ids)], dim=1)

    @torch.no_grad()
    def difference():
        return (
            (model(**padded, use_cache=False).logits[:, 3:] - model(**own, use_cache=False).logits).abs().max().item()
        )

    assert difference() < 1e-5
    parscale.wrap(model, zoo.P, prefix_length=zoo.T, init="random")
    zoo.fill_streams(model)
    assert difference() < 2e-5
    if make in (qwen2_vl, qwen3_vl):  # whose own positions of a further token are those of the whole mask
        return
    with torch.no_grad():
        alone, whole = (model(**x, use_cache=True) for x in (own, padded))
        more = {"input_ids": zoo.token_ids(length=1)}
        seen = torch.cat([padded["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
        after = [
            model(**more, attention_mask=seen[:, 3:], **given(model, alone.past_key_values)),
            model(**more, attention_mask=seen, **given(model, whole.past_key_values)),
        ]
    zoo.close(after[1].logits, after[0].logits, 2e-5)


@pytest.mark.parametrize("make", [qwen2_vl, qwen2_5_vl, qwen3_vl], ids=lambda make: make.__name__)
def test_left_padding_before_a_prompt(make, zoo):
    """Positions by axis `(3, B, S)`: a padded row is continued as it is alone."""
    model = parscale.wrap(build(make, zoo), zoo.P, prefix_length=zoo.T, init="random", transform="prompt")
    with torch.no_grad():
        model.parscale.active.transform.parameters()[0].normal_()
    ids = zoo.token_ids().clamp(max=89)
    front = torch.zeros(2, 3, dtype=torch.long)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    mask = torch.cat([front, torch.ones_like(ids)], dim=1)
    padded = model.generate(torch.cat([front, ids], dim=1), attention_mask=mask, **options)
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(padded.sequences[:, 3:], alone.sequences)
    zoo.close(torch.stack(padded.logits), torch.stack(alone.logits), 2e-5)


@torch.no_grad()
def test_an_error_leaves_no_mask_behind(zoo):
    """The backbone alone has its own positions, whatever the module around it was called with before."""
    model = parscale.wrap(build(llava, zoo), zoo.P, prefix_length=zoo.T, init="random")
    zoo.fill_streams(model)
    ids, mask, backbone = zoo.token_ids().clamp(max=89), torch.ones(2, 9, dtype=torch.long), model.get_decoder()
    mask[:, :3] = 0
    own = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(9).expand(2, -1)}
    expected = backbone(**own)[0]

    def fail(*_):
        raise RuntimeError("on purpose")

    hook = backbone.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(input_ids=ids, attention_mask=mask)
    hook.remove()
    assert torch.equal(backbone(**own)[0], expected)


def test_a_prompt_and_masks_that_know_nothing_of_it(zoo):
    model = parscale.wrap(build(gemma3_with_images, zoo), zoo.P, prefix_length=zoo.T, init="random", transform="prompt")
    said = r"makes masks of its own for layers with a window.*with a cache, use transform="
    with pytest.raises(ValueError, match=said):
        model.generate(zoo.token_ids().clamp(max=89), max_new_tokens=3)


# -- two passes, of streams that share keys and values


@pytest.mark.parametrize("rows", [2, 3])
def test_one_uncertain_row_and_positions_by_axis(rows, zoo):
    """Also of as many rows as there are axes."""
    model, ids = zoo.share(build(qwen2_vl, zoo)), zoo.token_ids(rows).clamp(max=89)
    positions = torch.arange(zoo.S).expand(3, rows, -1).clone()
    positions[1:] += torch.arange(rows)[None, :, None]
    options = {"logits_to_keep": 1, "use_cache": False, "position_ids": positions}
    mixed = logits_of(model, ids, **options)
    with model.use_streams(None):
        alone = logits_of(model, ids, **options)
    entropy = torch.special.entr(alone.softmax(-1)).sum(-1)  # (rows, 1)
    with adaptive_streams(model, float(entropy.mean())) as adaptive:
        found = logits_of(model, ids, **options)
    assert 0 < adaptive.ran < rows
    zoo.close(found, torch.where((entropy > entropy.mean())[..., None], mixed, alone), 2e-5)


def test_the_last_logits_after_images(zoo):
    model, arguments = zoo.share(build(qwen3_vl, zoo)), picture_inputs(qwen3_vl, zoo, 2)()
    whole = logits_of(model, **arguments, use_cache=False)
    for kept in (1, 5):
        found = logits_of(model, **arguments, use_cache=False, logits_to_keep=kept)
        zoo.close(found, whole[:, -kept:], 2e-5)


def test_the_last_logits_of_experts_whose_router_is_reported(zoo):
    model, ids = zoo.share(build(qwen3_vl_moe, zoo)), zoo.token_ids().clamp(max=89)
    whole = logits_of(model, ids)
    model.config.text_config.output_router_logits = True
    zoo.close(logits_of(model, ids, logits_to_keep=2), whole[:, -2:], 2e-5)
