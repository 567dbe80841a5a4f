"""A second small backbone, of another family than the packaged Qwen2, for benchmarks that want two.

A GPT-NeoX of 3.4 million parameters (parallel residual, LayerNorm, biases, a quarter of each head rotated, as many key
heads as query heads) is pretrained on the standard library's training files with the packaged model's tokenizer.

    python benchmarks/second_backbone.py --output neox
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, set_seed

from parscale.checkpoints import (
    Source,
    TrainSettings,
    evaluate,
    faster_in_bf16,
    small_model_path,
    standard_library_split,
    train,
)

SEQUENCE_LENGTH = 512


def new_model(vocabulary: int, eos_token_id: int) -> GPTNeoXForCausalLM:
    """The model with drawn weights, in float32."""
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )
    return GPTNeoXForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--tokens", type=int, default=8_000_000, help="how many to train on")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="at its peak")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(str(small_model_path()))
    training, held_out = standard_library_split()
    settings = TrainSettings(
        data=[Source.of("the standard library", training)],
        tokens=args.tokens,
        sequence_length=SEQUENCE_LENGTH,
        batch_size=4,
        learning_rate=args.learning_rate,
        decay=0.98,  # from the end of the warm-up on
        bf16=faster_in_bf16(torch.device("cpu")),
        seed=args.seed,
    )
    with tempfile.TemporaryDirectory() as drawn:
        new_model(len(tokenizer), tokenizer.eos_token_id).save_pretrained(drawn)
        tokenizer.save_pretrained(drawn)
        report = train(drawn, args.output, settings)
    model = AutoModelForCausalLM.from_pretrained(args.output)
    loss = evaluate(model, tokenizer, [(name, text[:3500]) for name, text in held_out], sequence_length=512).loss
    print(
        f"{report['parameters']:,} parameters, {report['tokens']:,} tokens in {report['seconds']:.0f} s, "
        f"held-out loss {loss:.4f}"
    )


if __name__ == "__main__":
    main()
