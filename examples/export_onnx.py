"""Export a model with streams to ONNX, and let ONNX Runtime continue a text without torch and parscale.

Needs `parscale[onnx]`. The loop, `continued`, works for any decoder: nothing in it knows of streams. ONNX Runtime GenAI
has such a loop built in, and runs the same folder by its `genai_config.json`.

    python examples/export_onnx.py --output exported --dtype int4
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale import wrap
from parscale.checkpoints import small_model_path
from parscale.export.onnx import export_onnx


def continued(folder: Path, ids: np.ndarray, steps: int) -> np.ndarray:
    """The ids `(B, N)` and as many likeliest tokens after them."""
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    cache = {
        each.name: np.zeros((len(ids), each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past_key_values")
    }
    new = ids
    for _ in range(steps):
        mask = np.ones_like(ids)
        logits, *kept = session.run(None, {"input_ids": new, "attention_mask": mask, **cache})
        cache = dict(zip(cache, kept, strict=True))
        new = logits[:, -1:].argmax(-1)
        ids = np.concatenate([ids, new], axis=1)
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(small_model_path()))
    parser.add_argument("--num-streams", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "int8", "int4"])
    parser.add_argument("--text", default="def add(a, b):\n")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--output", help="keep the exported folder here")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").eval()
    wrap(model, num_streams=args.num_streams, seed=0)
    with tempfile.TemporaryDirectory() as temporary:
        source, output = Path(temporary, "streams"), Path(args.output or Path(temporary, "exported"))
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
        report = export_onnx(str(source), output, dtype=args.dtype)
        print(f"{report['backbone']}, P = {report['num_streams']}, {report['dtype']}: {report['cache']['heads']} heads")

        inputs = tokenizer(args.text, return_tensors="pt")
        found = continued(output, inputs.input_ids.numpy(), args.max_new_tokens)
    print(tokenizer.decode(found[0]))
    expected = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    same = np.array_equal(found[:, : expected.shape[1]], expected.numpy())  # generate stops at the end of a text
    print(f"the tokens that generate writes: {same}")


if __name__ == "__main__":
    main()
