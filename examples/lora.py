"""Train streams together with a LoRA adapter on the backbone; save and load both. Needs `parscale[peft]`.

Wrap first, then add the adapter: the streams stay trainable beside it, and are saved and loaded with it.

    python examples/lora.py --steps 100 --output adapted
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale import load, wrap
from parscale.checkpoints import pack_documents, package_source_split, small_model_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(small_model_path()))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", help="folder for adapter and streams; a temporary one if left out")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    documents, _ = package_source_split(["numpy"])  # text that the small model has not seen
    blocks = torch.from_numpy(pack_documents(documents[:10], tokenizer, 128).ids).long()
    model = wrap(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32), num_streams=4, seed=0)
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    model.print_trainable_parameters()

    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-3)
    for step in range(args.steps):
        batch = blocks[torch.arange(4 * step, 4 * step + 4) % len(blocks)]
        loss = adapted(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss of the last step: {loss.item():.4f}")

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or temporary
        adapted.save_pretrained(folder)
        again = PeftModel.from_pretrained(load(folder, backbone=args.model, dtype=torch.float32), folder)
    with torch.no_grad():
        same = torch.allclose(again.eval()(batch).logits, adapted.eval()(batch).logits, atol=1e-5)
    print(f"loaded again, the same logits: {same}")


if __name__ == "__main__":
    main()
