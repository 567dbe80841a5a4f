"""What a configuration may say of a model whose cost is not counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parscale.scaling_laws.fields import brief
from parscale.scaling_laws.layers import INDEXER_STEP

# What is not counted in a model, and the families that have it.
UNCOUNTED = {
    "attention to what an encoder returns": {
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "evolla", "idefics", "marian", "mbart",
        "musicgen_decoder", "musicgen_melody_decoder", "mvp", "pegasus", "plbart", "prophetnet", "t5_gemma_module",
        "t5gemma2_decoder", "t5gemma2_text", "trocr", "whisper",
    },
    "attention whose keys and values no cache keeps": {"openai-gpt", "reformer", "xlm", "xlnet"},
    "attention with products beside those of scores and values": {"diffllama", "doge"},
    "attention with a router that chooses its heads": {"jetmoe"},
    "layers with attention and a state space side by side": {"falcon_h1"},
    "layers that hold attention, a state space or experts alone": {"nemotron_h"},
    "layers that use the same weights": {"hrm_text", "inkling2_loop_text", "zamba", "zamba2"},
    "adapters of single languages": {"xmod"},
    "adapters of images and sound": {"phi4_multimodal"},
    "experts of images beside those of text": {"ernie4_5_vl_moe", "ernie4_5_vl_moe_text"},
    "experts that are narrower than the layers": {"muse_spark_text"},
    "indexers unlike that of DeepSeek-V3.2": {"qwen4_exp_text"},
    "tokens of its own before every text": {"cpmant"},
    "embeddings of the shape and the sound of tokens": {"roc_bert"},
    "streams of sound": {"kyutai_speech_to_text", "moshi"},
}  # fmt: skip
# Fields that say the same, of any family.
UNCOUNTED_FIELDS = {
    "is_encoder_decoder": "attention to what an encoder returns",
    "add_cross_attention": "attention to what an encoder returns",
    "compress_rates": "keys of several tokens at once",
    "compress_ratios": "keys of several tokens at once",
    "sparse_attention_config": "attention to chosen blocks of tokens",
}
EMBEDDINGS = ("embedding_size", "input_embedding_size", "word_embed_proj_dim")


def require_counted(contents: Mapping[str, Any], name: str, hidden: int) -> None:
    """Raises `ValueError` for a model with parts whose parameters, cache or arithmetic are not counted.

    Args:
        contents: of a `config.json`.
        name: its model type.
        hidden: H.
    """
    found = next(((what, "") for what, families in UNCOUNTED.items() if name in families), None)
    for field, what in UNCOUNTED_FIELDS.items():
        if contents.get(field):
            found = found or (what, f" ({field} is {brief(contents[field])})")
    for field in EMBEDDINGS:
        if (width := contents.get(field)) and width != hidden:
            found = found or (f"embeddings of another size than the layers' {hidden}", f" ({field} is {brief(width)})")
    for field in ("index_n_heads", "indexer_n_heads", "index_topk"):
        if contents.get(field) and name not in INDEXER_STEP:
            found = found or ("indexers unlike that of DeepSeek-V3.2", f" ({field} is {brief(contents[field])})")
    if found:
        what, field = found
        raise ValueError(f"the cost of {name!r} is not counted, since it has {what}{field}; give a model without")
