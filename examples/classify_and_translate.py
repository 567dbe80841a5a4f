"""Streams beyond language models: an encoder that classifies, one that sees, and an encoder with a decoder.

The models are small and untrained, so that this runs offline; for real ones call `from_pretrained` in place of making
them from a configuration. Each is wrapped, run, saved and loaded again.

    python examples/classify_and_translate.py
"""

from __future__ import annotations

import tempfile

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from parscale import load, wrap

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3}


def main() -> None:
    torch.manual_seed(0)
    ids = torch.randint(1, 100, (2, 12))
    pairs = [
        (BertForSequenceClassification(BertConfig(vocab_size=100, **SIZES)), {"input_ids": ids}),
        (
            ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **SIZES)),
            {"pixel_values": torch.randn(2, 3, 32, 32)},
        ),
        (
            T5ForConditionalGeneration(
                T5Config(vocab_size=100, d_model=64, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0)
            ),
            {"input_ids": ids, "decoder_input_ids": ids[:, :5]},
        ),
    ]
    for model, inputs in pairs:
        wrap(model.eval(), num_streams=4, seed=0)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            logits = model(**inputs).logits
            model.save_pretrained(folder)
            same = torch.equal(load(folder)(**inputs).logits, logits)
        print(f"{type(model).__name__}: logits {tuple(logits.shape)}, the same when loaded again: {same}")
    translated = pairs[-1][0].generate(ids, num_beams=2, max_new_tokens=5)
    print(f"beam search wrote {tuple(translated.shape)}")


if __name__ == "__main__":
    main()
