"""Names of arguments that models and adapters take, and their meaning.

Across its models, transformers uses one name for arguments of one meaning, and documents the frequent ones with each
model; there is no complete list. Most need no entry here: if a tensor's first dimension is the number of rows, each row
is copied for each stream, whatever the argument's name is. These tables list the exceptions, and the arguments with one
entry for each token, to which a prompt adds entries.

`tests/compat/test_arguments.py` runs each architecture, and reports an argument with one entry for each row or token
that no table lists. Add a new name to the table that describes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def by_name(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name.

    Args:
        names: of the function's parameters, in their order.
        args: those given by position.
        kwargs: those given by name.
    """
    return dict(zip(names[: len(args)], args, strict=True)) | kwargs


# -- inputs

TEXT, IMAGES, AUDIO = "input_ids", "pixel_values", "input_features"
# The first given input defines the number of rows; a backbone's own main input may do so, too.
INPUTS = (TEXT, "inputs_embeds", IMAGES, AUDIO, "input_values", "audio_input_ids")
ENCODED = ("encoder_hidden_states", "encoder_attention_mask")
NOISE = "noise"  # random numbers for image patches; the patches with the largest are masked (ViT-MAE)

LAYER_SOURCES = ("key_value_states", "encoder_hidden_states")  # a cross-attention layer's argument: whence keys come
# An assistant model's argument: keys and values of the model that it drafts for (Gemma 4's assistant).
KEYS_OF_TARGET = "shared_kv_states"

# -- caches

# The cache argument of a backbone, by kind. Since transformers 5.24 all but RWKV's `state` are called `cache`; until
# 5.40 the older names work, too.
CACHES = ("cache", "past_key_values", "cache_params", "state")
PAGES = "write_index"  # with it, one cache for all requests, which stand in one row: continuous batching
LAYER_CACHES = ("layer_past", "past_key_values", "cache")  # an attention layer's argument


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among a backbone's arguments, under any of its names; `None` if there is none.

    Args:
        arguments: by name.
    """
    return next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)


# -- masks and positions

LAYER_MASKS = ("attention_mask", "mask")  # an attention layer's argument
POSITIONS = "position_ids"  # also (S,), the same for all rows, and (3, B, S), multimodal

# -- arguments without one row for each sequence

# For all rows of a batch, or already for the streams' P*B rows.
NOT_COPIED = (
    *CACHES,
    "encoder_past_key_values",
    "mems",
    "padding_cache",
    "past_buckets_states",
    # by layer and head, or by token; boundaries and lengths of packed documents, counted through a stream's rows
    "head_mask",
    "cache_position",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "logits_to_keep",
    "num_items_in_batch",
)
# Any number of entries for each row, in the order of the rows: image tokens, by layer; images and their tiles; audio.
ANY_ROWS = (
    "deepstack_visual_embeds",
    "deepstack_features",
    "cross_attention_states",
    "image_embeds",
    "audio_input_ids",
    "audio_input_ids_mask",
)

# -- arguments with one entry for each token

# The entries for a prompt are those of the first token, or zero.
COPIED_FROM_FIRST_TOKEN = (
    "langs",
    "task_type_ids",
    "bbox",
    "input_shape_ids",
    "input_pronunciation_ids",
    "xpath_tags_seq",
    "xpath_subs_seq",
)
PER_TOKEN = (
    *COPIED_FROM_FIRST_TOKEN,
    "token_type_ids",
    "global_attention_mask",
    "vision_mask",
    "image_embeds_position_mask",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "visual_pos_masks",
    "ple_input_ids",
    "per_layer_inputs",
)
# Backbones whose input is always the whole text, of which they leave out as many tokens as their cache has. Without a
# mask they count the ids that are no padding, or take `lengths`, their number in each row.
WHOLE_TEXT = ("FlaubertModel", "XLMModel")
UNUSED_ARGUMENTS = {"WhisperEncoder": ("attention_mask",)}  # by class: accepted, of any number of rows
IMAGE_MASKS = ("cross_attention_mask", "full_text_row_masked_out_mask")  # (R, 1, S, ...); a prompt sees none

# -- PEFT: arguments that it passes to its layers

OF_ADAPTERS = ("adapter_names", "alora_offsets")  # one entry for each row
NO_ADAPTER = "__base__"  # PEFT's name for rows without an adapter
