"""A model small enough to be counted by hand, on devices that count one thing each."""

from parscale.scaling_laws import Hardware

# One byte or one operation a second: the seconds are the bytes, or the operations.
BYTES_ONLY = Hardware("bytes", "", 1e9, 1e-9, 1e30, 1e30, 1, 1)
FLOPS_ONLY = Hardware("flops", "", 1e9, 1e30, 1e-12, 1e-12, 1, 1)

TINY = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 10,
    "parscale_n_tokens": 5,
    "tie_word_embeddings": True,
}
LAYER = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # matrices of one layer, by hand
