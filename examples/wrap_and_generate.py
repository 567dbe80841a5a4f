"""Give a Hugging Face model four parallel streams and generate with it as before.

Uses the small model that the package carries, so it runs offline; any other name goes after `--model`.

    python examples/wrap_and_generate.py --model Qwen/Qwen2.5-0.5B --prompt "def fibonacci(n):"
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale import unwrap, wrap
from parscale.checkpoints import small_model_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(small_model_path()))
    parser.add_argument("--prompt", default="def read_config(path):\n")
    parser.add_argument("--num-streams", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    inputs = tokenizer(args.prompt, return_tensors="pt")

    wrap(model, args.num_streams, seed=0)  # in place: the class and all methods stay
    print(f"{type(model).__name__} with {model.num_streams} streams, not trained yet:")
    output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))

    unwrap(model)  # the backbone again, to the last bit
    print("\nThe backbone:")
    output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
