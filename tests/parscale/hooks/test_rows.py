"""Inputs with one row for each sequence, whatever they are called: each stream gets the rows that belong to its own."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
from typing import Any

import pytest
import torch
import transformers

import parscale
from parscale.compat.arguments import ANY_ROWS, INPUTS, NOT_COPIED
from parscale.hooks.rows import copy_rows

P, B, S = 3, 2, 8
TOLERANCE = 2e-5  # as in test_families.py
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
XLM = {"vocab_size": 96, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64, "n_langs": 3}
XLM |= {"dropout": 0.0, "attention_dropout": 0.0}


def draw(high: int, *shape: int, low: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape) + high))


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A model with more inputs for each row: its configuration's options, those inputs, and the transforms it takes."""

    name: str
    config: str
    options: dict[str, Any]
    inputs: dict[str, torch.Tensor]
    transforms: tuple[str, ...] = ("prefix", "lora")

    def plain(self) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, self.name)(getattr(transformers, f"{self.config}Config")(**self.options))
            for parameter in model.parameters():
                with torch.no_grad():
                    if parameter.ndim > 1:
                        parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
        return model.eval()


ENCODERS = {
    encoder.name: encoder
    for encoder in [
        Encoder(
            "LayoutLMForTokenClassification",
            "LayoutLM",
            SIZES | {"max_2d_position_embeddings": 64},
            {"bbox": draw(60, B, S, 4).sort(-1).values},
        ),
        Encoder(
            "ErnieForSequenceClassification",
            "Ernie",
            SIZES | {"use_task_id": True, "task_type_vocab_size": 3},
            {"task_type_ids": draw(3, B, S)},
        ),
        Encoder(
            "RoCBertForSequenceClassification",
            "RoCBert",
            SIZES
            | {
                "pronunciation_vocab_size": 20,
                "shape_vocab_size": 20,
                "pronunciation_embed_dim": 8,
                "shape_embed_dim": 8,
            },
            {"input_shape_ids": draw(20, B, S), "input_pronunciation_ids": draw(19, B, S)},
        ),
        Encoder(
            "MarkupLMForTokenClassification",
            "MarkupLM",
            SIZES
            | {
                "max_depth": 4,
                "max_xpath_tag_unit_embeddings": 20,
                "max_xpath_subs_unit_embeddings": 20,
                "tag_pad_id": 19,
                "subs_pad_id": 19,
                "xpath_unit_hidden_size": 8,
            },
            {"xpath_tags_seq": draw(20, B, S, 4), "xpath_subs_seq": draw(19, B, S, 4)},
        ),
        Encoder(
            "LongformerForTokenClassification",
            "Longformer",
            SIZES | {"attention_window": 4},
            {"attention_mask": torch.ones(B, S, dtype=torch.long), "global_attention_mask": draw(2, B, S)},
            ("lora",),
        ),
        Encoder(
            "XLMForSequenceClassification",
            "XLM",
            XLM,
            {"langs": draw(3, B, S), "lengths": torch.tensor([8, 5])},
            ("lora",),
        ),
        Encoder(
            "LukeModel",
            "Luke",
            SIZES | {"entity_vocab_size": 20, "entity_emb_size": 8, "type_vocab_size": 2},
            {
                "entity_ids": draw(20, B, 3),
                "entity_attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]),
                "entity_position_ids": draw(S, B, 3, 2),
                "entity_token_type_ids": draw(2, B, 3),
            },
            ("lora",),
        ),
        Encoder(
            "VisualBertModel",
            "VisualBert",
            SIZES | {"visual_embedding_dim": 8},
            {"visual_embeds": draw(9, B, 3, 8) / 9, "visual_token_type_ids": draw(2, B, 3)},
            ("lora",),
        ),
    ]
}
RUNS = [(name, transform) for name, encoder in ENCODERS.items() for transform in encoder.transforms]


def words(text: str) -> set[str]:
    return set(text.split())


def result(model: Any, **arguments: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=draw(96, B, S, low=3)[: len(next(iter(arguments.values())))], **arguments)[0]


@pytest.mark.parametrize("name", ENCODERS)
def test_streams_that_change_nothing_give_what_the_plain_model_gives(name, zoo):
    """A low-rank difference starts as none: then every stream is the backbone, with the row's own inputs."""
    encoder = ENCODERS[name]
    expected = result(encoder.plain(), **encoder.inputs)
    for argument, value in encoder.inputs.items():  # each of them matters
        if argument != "attention_mask":
            other = encoder.inputs | {argument: value.flip(0)}
            assert (result(encoder.plain(), **other) - expected).abs().max() > 1e-3, argument
    model = parscale.wrap(encoder.plain(), P, transform="lora", seed=0)
    zoo.close(result(model, **encoder.inputs), expected, TOLERANCE)


@pytest.mark.parametrize(("name", "transform"), RUNS)
def test_a_row_by_itself_is_the_same(name, transform, zoo):
    encoder = ENCODERS[name]
    model = parscale.wrap(encoder.plain(), P, prefix_length=4, rank=3, init="random", seed=0, transform=transform)
    with torch.no_grad():
        for parameter in model.parscale.tensors(model.parscale.active).values():
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(1))
    together = result(model, **encoder.inputs)
    assert (together - result(encoder.plain(), **encoder.inputs)).abs().max() > 1e-2
    ids = draw(96, B, S, low=3)
    with torch.no_grad():
        alone = [
            model(input_ids=ids[b : b + 1], **{name: value[b : b + 1] for name, value in encoder.inputs.items()})[0]
            for b in range(B)
        ]
    zoo.close(together, torch.cat(alone), TOLERANCE)


@pytest.mark.parametrize("name", [name for name in ENCODERS if name.endswith("ForTokenClassification")])
def test_a_prompt_has_inputs_of_its_own(name, zoo):
    """A prompt of the embeddings of a text is that text, with the other inputs of the row's first token, or zeros."""
    encoder, T = ENCODERS[name], 4
    texts, ids = draw(90, P, T, low=3), draw(96, B, S, low=3)
    model = parscale.wrap(encoder.plain(), P, prefix_length=T, smoothing=0.0, init="random", transform="prompt")
    (prompt,) = model.parscale.active.transform.parameters()
    with torch.no_grad():
        prompt.copy_(model.get_input_embeddings()(texts))
        zeroed, biased = list(model.parscale.aggregator(model.parscale.active).parameters())[-2:]
        zeroed.zero_()
        for p in range(P):
            biased.fill_(-1e4)[p] = 1e4
            plain = {"input_ids": torch.cat([texts[p].expand(B, -1), ids], dim=1)}
            for argument, value in encoder.inputs.items():
                first = 0 * value[:, :1] if argument == "global_attention_mask" else value[:, :1]
                plain[argument] = torch.cat([first.repeat_interleave(T, dim=1), value], dim=1)
            zoo.close(result(model, **encoder.inputs), encoder.plain()(**plain).logits[:, T:], TOLERANCE)


def copied(value: Any, name: str = "some_input", rows: int = B) -> Any:
    return copy_rows(torch.nn.Identity(), {name: value}, "default", P, rows)[name]


@pytest.mark.parametrize("shape", [(B,), (B, S), (B, 1, S, S), (B, 0)])
def test_what_has_a_row_for_each_sequence_is_copied(shape):
    value = torch.randn(shape)
    assert torch.equal(copied(value), value.repeat(P, *[1] * (len(shape) - 1)))
    assert torch.equal(copied({"layer": [value]})["layer"][0], copied(value))


@pytest.mark.parametrize("shape", [(), (1,), (1, S), (1, 1, S, S)])
def test_what_is_for_all_rows_stays(shape):
    value = torch.randn(shape)
    assert copied(value) is value
    for other in (None, True, 3, "sdpa", [1, 2], {"a": None}):
        assert copied(other) == other


@pytest.mark.parametrize("name", NOT_COPIED)
def test_what_is_known_to_be_no_row_stays_whatever_its_shape(name):
    for value in (torch.randn(B, S), [torch.randn(B, S)], torch.randn(B)):
        assert copied(value, name) is value


def test_what_a_decoder_reads_of_an_encoder_with_streams_stays():
    value = torch.randn(P * B, S)
    assert copied(value, "encoder_hidden_states") is value


@pytest.mark.parametrize("name", ANY_ROWS)
def test_what_has_any_number_of_entries_for_a_row_is_copied_whole(name):
    value = torch.randn(5, S)
    assert torch.equal(copied(value, name), torch.cat([value] * P))
    assert torch.equal(copied([value, value], name)[1], torch.cat([value] * P))


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_positions(rows):
    """One for each kind of place (3 or 4), for each row or for all, also where the numbers are the same."""
    plain, kinds = torch.randn(rows, S), torch.randn(3, rows, S)
    assert torch.equal(copied(plain, "position_ids", rows), plain.repeat(P, 1))
    assert torch.equal(copied(kinds, "position_ids", rows), kinds.repeat(1, P, 1))
    for shared in (torch.randn(rows), torch.randn(1, S), torch.randn(3, 1, S)):
        if rows > 1:
            assert copied(shared, "position_ids", rows) is shared


@pytest.mark.parametrize("shape", [(4, S), (3, B, S), (5,)])
def test_what_is_not_understood_is_named(shape, tiny):
    model = parscale.wrap(tiny(), P, prefix_length=4, init="random", seed=0)
    ids = draw(90, B, S, low=3)
    with pytest.raises(ValueError, match=rf"LlamaModel.*some_bias.*{re.escape(str(shape))}.*2 rows.*use_streams"):
        model(input_ids=ids, some_bias=torch.zeros(shape))
    with model.use_streams(None):
        model(input_ids=ids, some_bias=torch.zeros(shape))


# Arguments of transformers' backbones with one row for each sequence, or one for all.
ROWS = words("""
    action_embeds aspect_ratio_ids aspect_ratio_mask attention_mask audio_attention_mask backbone_last_hidden_state bbox
    bool_masked_pos char_count_per_id char_input_ids cross_attention_mask dataset_index decoder_attention_mask
    decoder_input_ids decoder_input_values decoder_inputs_embeds decoder_position_ids encoder_attention_mask
    encoder_embeds encoder_hidden_states encoder_inputs_embeds entity_attention_mask entity_ids entity_position_ids
    entity_token_type_ids feature_attention_mask flattened_patches full_text_row_masked_out_mask global_attention_mask
    height image image_attention_mask image_embeds_position_mask image_encoder_embeddings image_text_alignment
    input_features input_features_mask input_ids input_mask input_pronunciation_ids input_shape_ids input_values
    input_values_mask inputs inputs_embeds is_longer labels lang_id lang_ids langs last_hidden_state lengths
    mask_time_indices mm_token_type_ids moe_mm_token_type_ids noise padding_mask padding_mask_videos
    patch_attention_mask patch_embeds patch_ids patch_lengths per_layer_inputs perceiver_embeddings perm_mask
    pixel_attention_mask pixel_mask pixel_position_ids pixel_values ple_input_ids position_bias position_ids
    prompt_masks prompt_pixel_values protein_attention_mask protein_input_ids qformer_attention_mask qformer_input_ids
    query_embeds self_conditioning_logits self_conditioning_mask sequence_id speaker_embedding speaker_embeddings
    speaker_id speaker_ids structure_batch_mask structure_feats target_mapping task_type_ids token_type_ids trend
    vision_mask visual_attention_mask visual_bbox visual_embeds visual_feats visual_pos visual_pos_masks
    visual_token_type_ids width xpath_subs_seq xpath_tags_seq
""")
# Those of classes around a backbone, which prepare something else for the backbone itself, and of parts of detectors,
# codecs and the like, which no streams run on.
AROUND = words("""
    aftercnn_lens asym_id attention_similarity audio_codes audio_embed_sizes audio_feature_lengths audio_input_features
    audio_latents audio_latents_mask audio_prompt_latents audio_prompt_latents_mask audio_scales batch_num_images
    chunk_sample_lengths context_attention_mask context_input_ids deletion_mean deletion_value doc_scores
    duration_labels encoder_outputs energy_labels entity_id feature_lens global_pointer grid_thw has_deletion
    high_res_pixel_values image_embeddings image_grid_hw image_grid_thw image_grids image_hidden_states
    image_merge_sizes image_num_crops image_patches image_pixel_values image_position_ids image_sizes image_sizes_videos
    image_token_pooling images_per_sample input_boxes input_boxes_labels input_labels input_masks input_points
    intermediate_embeddings level_start_index lm_hidden_states mask_feat mask_query_head memory_key_padding_mask
    memory_mask merge_sizes mm_encoder_outputs mol_type msa msa_attention_mask msa_batch_mask msa_feats noise_sequence
    norm num_delay_tokens num_frames_per_video num_local_patches object_queries object_queries_position_embeddings
    order_head pitch_labels pixel_values_images pixel_values_local pixel_values_videos query_position_embeddings
    reference_points res_type residue_index second_per_grid_ts self_attn_mask spatial_position_embeddings spatial_shapes
    spatial_shapes_list spectrogram_labels spkr_id sym_id target_embedding target_sizes target_sizes_videos task_inputs
    text_embeds text_encoder_attention_mask text_encoder_hidden_states text_inputs tile_fine_mask token_bonds
    token_index valid_ratios video_compression_mask video_grid_thw video_grids video_merge_sizes video_position_ids
    video_second_per_grid video_token_pooling vision_embeds vision_encoder_attention_mask vision_encoder_hidden_states
    x4_feat
""")
# No tensors, where no annotation says so.
FLAGS = words("""
    interpolate_pos_encoding kwargs lm_kwargs output_attentions output_hidden_states return_dict return_loss sample
    use_audio_in_video use_cache
""")


def backbones_of_transformers() -> list[type]:
    """All classes that read one of the inputs, but for those with a head, which are around a backbone."""
    found = []
    for package in pkgutil.iter_modules(transformers.models.__path__, "transformers.models."):
        for module in pkgutil.iter_modules(importlib.import_module(package.name).__path__, f"{package.name}."):
            if ".modeling_" not in module.name:
                continue
            try:
                classes = vars(importlib.import_module(module.name)).values()
            except ImportError:  # it needs a package that is not installed
                continue
            found += [
                cls
                for cls in classes
                if inspect.isclass(cls)
                and issubclass(cls, transformers.PreTrainedModel)
                and cls.__module__ == module.name
                and not re.search("For[A-Z]|LMHead|DoubleHeads", cls.__name__)
                and inspect.signature(cls.forward).parameters.keys() & INPUTS
            ]
    return found


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.versions
def test_every_tensor_that_a_backbone_of_transformers_takes_is_classified():
    """A name that is new in transformers fails here: look at what it holds, and say whether it has one row each."""
    known = ROWS | AROUND | FLAGS | {*NOT_COPIED, *ANY_ROWS}
    classes = backbones_of_transformers()
    assert len(classes) > 500
    unknown = {
        name: cls.__name__
        for cls in classes
        for name, parameter in list(inspect.signature(cls.forward).parameters.items())[1:]
        if name not in known
        and (
            parameter.annotation is inspect.Parameter.empty
            or re.search("Tensor|Any|object|Output", str(parameter.annotation))
        )
    }
    assert not unknown
