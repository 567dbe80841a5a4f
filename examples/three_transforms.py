"""What makes streams differ: prefixes, prompts or low-rank differences, also on a model without keys and values.

Three sets of streams stand on one language model, the small one that the package carries, and are switched; then a new
Mamba, which has no place for a prefix, gets prompts. It runs offline and trains nothing.

    python examples/three_transforms.py
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from parscale import UnsupportedModelError, wrap
from parscale.checkpoints import small_model_path


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_model_path())
    model = wrap(AutoModelForCausalLM.from_pretrained(small_model_path()), num_streams=4, seed=0)
    model.add_streams("prompts", num_streams=4, transform="prompt", prefix_length=16, seed=0)
    model.add_streams("low-rank", num_streams=4, transform="lora", rank=4, seed=0)

    ids = tokenizer("def read_config(path):\n", return_tensors="pt")["input_ids"]
    for name in ("default", "prompts", "low-rank"):
        model.set_streams(name)
        model.freeze_backbone()
        print(f"{name}: ", end="")
        model.print_trainable_parameters()
        with torch.no_grad():
            print(f"  loss {model(input_ids=ids, labels=ids).loss:.4f}")

    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2))
    try:
        wrap(mamba, num_streams=4)
    except UnsupportedModelError as error:
        print(f"\n{error}")
    wrap(mamba, num_streams=4, transform="prompt", prefix_length=16, seed=0)
    written = mamba.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, do_sample=False)
    print(f"{type(mamba).__name__} with {mamba.num_streams} streams wrote {written[0, 3:].numel()} tokens")


if __name__ == "__main__":
    main()
