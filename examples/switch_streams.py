"""Keep several sets of streams on one backbone and switch between them, as for more or less compute per token.

Sets share the backbone's weights and are each a small part of a large model's size.

    python examples/switch_streams.py
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale import wrap
from parscale.checkpoints import small_model_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(small_model_path()))
    parser.add_argument("--text", default="def add(a, b):\n    return a + b\n")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    input_ids = tokenizer(args.text, return_tensors="pt").input_ids
    with torch.no_grad():
        plain = model(input_ids).logits

        wrap(model, num_streams=2, seed=0)  # this set is called "default"
        model.add_streams("wide", num_streams=8, seed=0)  # inactive until chosen
        for name in ("default", "wide"):
            model.set_streams(name)
            loss = model(input_ids, labels=input_ids).loss.item()
            print(f"{name:>8}: P = {model.num_streams}, loss {loss:.4f}")

        with model.use_streams(None):  # the plain backbone, for a block
            same = torch.equal(model(input_ids).logits, plain)
            print(f"     off: P = {model.num_streams}, the backbone's logits to the last bit: {same}")
    print(f"after the block: P = {model.num_streams}")


if __name__ == "__main__":
    main()
