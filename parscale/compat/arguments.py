"""Names of arguments that models and adapters take, and what each of them holds.

transformers gives an argument of one meaning one name across its models, and documents the frequent ones with each
model; there is no list of all. Most need none here: of a tensor whose first dimension is the number of rows, each row
is copied for each stream, whatever the argument is called. These tables name those for which that does not hold, and
those that have one entry for each token, where a prompt has to make room.

`tests/compat/test_arguments.py` runs each architecture, and reports an argument with one entry for each row or token
that no table knows. A new name is added to the table that says what it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# -- inputs

TEXT, IMAGES, AUDIO = "input_ids", "pixel_values", "input_features"
# The first given one counts the rows; a backbone's own main input does, too.
INPUTS = (TEXT, "inputs_embeds", IMAGES, AUDIO, "input_values", "audio_input_ids")
ENCODED = ("encoder_hidden_states", "encoder_attention_mask")
NOISE = "noise"  # numbers for the patches of an image, of which those with the largest are hidden (ViT-MAE)

# -- caches

# A backbone's argument, by its kind. Since transformers 5.24 all but RWKV's `state` are called `cache`; until 5.40 it
# also takes the names that they had before.
CACHES = ("cache", "past_key_values", "cache_params", "state")
LAYER_CACHES = ("layer_past", "past_key_values", "cache")  # an attention layer's argument


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among a backbone's arguments, under whichever of its names; `None` if there is none.

    Args:
        arguments: by their names.
    """
    return next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)


# -- masks and positions

LAYER_MASKS = ("attention_mask", "mask")  # an attention layer's argument
POSITIONS = "position_ids"  # also (S,), of the tokens of any row, and (3, B, S), multimodal

# -- without one row for each sequence

# For all rows of a batch, or of the streams' own P*B rows already.
WHOLE = (
    *CACHES,
    "encoder_past_key_values",
    "mems",
    "padding_cache",
    "past_buckets_states",
    # by layer and head, or by token; boundaries and lengths of packed documents, counted through the rows of a stream
    "head_mask",
    "cache_position",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "logits_to_keep",
    "num_items_in_batch",
)
# Any number of entries for each row, in the order of the rows: image tokens, by layer; images and their tiles; sounds.
PACKED = (
    "deepstack_visual_embeds",
    "deepstack_features",
    "cross_attention_states",
    "image_embeds",
    "audio_input_ids",
    "audio_input_ids_mask",
)

# -- with one entry for each token

# Those of a prompt are the first token's, or zero.
AS_FIRST = (
    "langs",
    "task_type_ids",
    "bbox",
    "input_shape_ids",
    "input_pronunciation_ids",
    "xpath_tags_seq",
    "xpath_subs_seq",
)
TOKENS = (
    *AS_FIRST,
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
SEES_IMAGES = ("cross_attention_mask", "full_text_row_masked_out_mask")  # (R, 1, S, ...); a prompt sees none

# -- PEFT: what it hands to its layers

OF_ADAPTERS = ("adapter_names", "alora_offsets")  # one entry for each row
NO_ADAPTER = "__base__"  # its name for rows without an adapter
