"""`genai_config.json`, by which ONNX Runtime GenAI runs a decoder without code of its own."""

from __future__ import annotations

from typing import Any

from parscale.errors import UnsupportedModelError
from parscale.export.decoder import CacheShape
from parscale.export.graph import INPUTS, LOGITS, PAST, PRESENT

GENAI_CONFIG = "genai_config.json"
SEARCH = ("temperature", "top_p", "top_k", "repetition_penalty")  # the runtime's names are those of transformers


def longest_text(config: Any) -> int:
    """The length of context that the runtime is told, in tokens: the model's, under the names that families give it.

    With LongRoPE it is the original length. Keys of a longer text are rotated by other factors, and those in the cache
    would have to be computed anew.

    Raises:
        UnsupportedModelError: the configuration states none.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *rope.values()):  # for all layers, or for each kind of layer
        if isinstance(each, dict) and each.get("rope_type") == "longrope":
            return int(each["original_max_position_embeddings"])
    for name in ("max_position_embeddings", "seq_length", "max_seq_len"):
        if (length := getattr(config, name, None)) is not None:
            return int(length)
    raise UnsupportedModelError(
        f"The configuration of {config.model_type} states no length of context, which the runtime needs: set "
        "max_position_embeddings in it."
    )


def genai_config(model: Any, shape: CacheShape, filename: str, length: int) -> dict[str, Any]:
    """The configuration of a graph.

    Args:
        model: that the graph was made of.
        shape: of its cache; to the runtime the streams are further key/value heads.
        filename: of the graph.
        length: of the context, in tokens, as `longest_text` finds it.
    """
    config, generation = model.config.get_text_config(), model.generation_config

    def token(name: str) -> Any:
        """An id of the generation's configuration, else of the model's, which may have no such field."""
        found = getattr(generation, name)
        return found if found is not None else getattr(config, name, None)

    end = token("eos_token_id")
    ends = [end] if isinstance(end, int) else list(end or [])
    start, padding = token("bos_token_id"), token("pad_token_id")
    if padding is None:
        padding = ends[0] if ends else 0
    # without a token of its own, the id after the last one, which the tokenizer never gives
    tokens = {
        "bos_token_id": config.vocab_size if start is None else start,
        "eos_token_id": ends,
        "pad_token_id": padding,
    }
    search = {name: value for name in SEARCH if (value := getattr(generation, name)) is not None}
    if search.get("top_k") == 0:  # all tokens to transformers, and the likeliest one to the runtime
        search["top_k"] = config.vocab_size
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
        "search": {
            "do_sample": bool(generation.do_sample),
            **search,
            "max_length": length,
            "past_present_share_buffer": False,
        },
    }
