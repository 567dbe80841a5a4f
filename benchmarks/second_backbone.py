"""A second small backbone, of another family than the packaged Qwen2, for benchmarks that want two.

A GPT-NeoX of 3.4 million parameters (parallel residual, LayerNorm, biases, a quarter of each head rotated, as many key
heads as query heads) is pretrained on the standard library's training files with the packaged model's tokenizer. The
learning rate falls to zero with the tokens, or with the clock where that ends the run first.

    python benchmarks/second_backbone.py --output neox --minutes 17
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, set_seed

from parscale.checkpoints.evaluation.text_loss import evaluate
from parscale.checkpoints.small_model import small_model_path
from parscale.checkpoints.texts.standard_library import pack, split
from parscale.checkpoints.training.posttrain import Recipe, faster_in_bf16, post_train

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
    parser.add_argument("--tokens", type=int, default=8_000_000, help="how many to train on at most")
    parser.add_argument("--minutes", type=float, default=17, help="how long to train at most")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="at its peak")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(str(small_model_path()))
    train, held_out = split()
    blocks = pack(train, tokenizer, SEQUENCE_LENGTH)
    model = new_model(len(tokenizer), tokenizer.eos_token_id)
    recipe = Recipe(
        args.tokens,
        backbone_learning_rate=args.learning_rate,
        warmup=0.02,
        seconds=60 * args.minutes,
        seed=args.seed,
    )
    training = post_train(model, blocks, recipe, bf16=faster_in_bf16(torch.device("cpu")))
    model.config.use_cache = True  # the Trainer turns it off
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    loss = evaluate(model, tokenizer, [(name, text[:3500]) for name, text in held_out], sequence_length=512).loss
    print(
        f"{model.num_parameters():,} parameters, {training.tokens:,} of {blocks.size:,} tokens in "
        f"{training.seconds:.0f} s, held-out loss {loss:.4f}"
    )


if __name__ == "__main__":
    main()
