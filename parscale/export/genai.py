"""`genai_config.json`, by which ONNX Runtime GenAI runs a decoder without code of its own."""

from __future__ import annotations

from typing import Any

from parscale.export.decoder import CacheShape
from parscale.export.graph import INPUTS, LOGITS, PAST, PRESENT

GENAI_CONFIG = "genai_config.json"


def genai_config(model: Any, shape: CacheShape, filename: str) -> dict[str, Any]:
    """The configuration of a graph.

    Args:
        model: that the graph was made of.
        shape: of its cache; to the runtime the streams are further key/value heads.
        filename: of the graph.
    """
    config, generation = model.config.get_text_config(), model.generation_config
    end = generation.eos_token_id if generation.eos_token_id is not None else config.eos_token_id
    ends = [end] if isinstance(end, int) else list(end or [])
    start = generation.bos_token_id if generation.bos_token_id is not None else config.bos_token_id
    padding = generation.pad_token_id if generation.pad_token_id is not None else config.pad_token_id
    if padding is None:
        padding = ends[0] if ends else 0
    # without a token of its own, the number after the last one, which no text has
    tokens = {
        "bos_token_id": config.vocab_size if start is None else start,
        "eos_token_id": ends,
        "pad_token_id": padding,
    }
    length = config.max_position_embeddings
    return {
        "model": {
            "type": "decoder",
            **tokens,
            "context_length": length,
            "vocab_size": config.vocab_size,
            "decoder": {
                "filename": filename,
                "session_options": {"provider_options": []},
                "hidden_size": config.hidden_size,
                "num_hidden_layers": shape.layers,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": shape.copies * shape.heads,
                "head_size": shape.head_size,
                "inputs": {
                    **{name: name for name in INPUTS},
                    "past_key_names": PAST.format("%d", "key"),
                    "past_value_names": PAST.format("%d", "value"),
                },
                "outputs": {
                    LOGITS: LOGITS,
                    "present_key_names": PRESENT.format("%d", "key"),
                    "present_value_names": PRESENT.format("%d", "value"),
                },
            },
        },
        "search": {"do_sample": False, "max_length": length, "past_present_share_buffer": False},
    }
