"""Load a checkpoint in the released format, without `trust_remote_code`, and generate with it.

Takes a folder or a name on the Hugging Face Hub, such as `ParScale/ParScale-1.8B-P4-Inst`. Without one it makes a
folder in that format from the small model that the package carries.

    python examples/load_released.py ParScale/ParScale-1.8B-P4-Inst --prompt "def fibonacci(n):"
"""

from __future__ import annotations

import argparse
import tempfile

from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale import load, wrap
from parscale.checkpoints import small_model_path


def make_checkpoint(folder: str) -> None:
    """A wrapped Qwen2 is saved in the released format."""
    source = small_model_path()
    wrap(AutoModelForCausalLM.from_pretrained(source), num_streams=4, seed=0).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="a folder, or a name on the Hub")
    parser.add_argument("--prompt", default="def read_config(path):\n")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        if args.checkpoint is None:
            make_checkpoint(folder)
        checkpoint = args.checkpoint or folder
        model = load(checkpoint).eval()
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    T = model.config.parscale_n_tokens
    print(f"{type(model).__name__}: P = {model.num_streams}, T = {T}, {model.dtype}")
    inputs = tokenizer(args.prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
