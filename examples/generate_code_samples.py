"""Let a model with streams solve programming problems, and write its solutions as EvalPlus reads them.

Takes a checkpoint (a folder, or a name on the Hugging Face Hub) and a file of problems, JSON lines with `task_id` and
`prompt`. Without these it runs offline, with four streams on the small model that the package carries and the three
problems below; what that model writes solves none of them. `docs/evaluation.md` says how to score the file. Scoring
runs the solutions, so do it in a sandbox.

    python examples/generate_code_samples.py trained --problems HumanEvalPlus.jsonl --output samples.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale import load, wrap
from parscale.checkpoints import small_model_path

PROBLEMS = [
    {"task_id": "Example/0", "prompt": 'def double(x):\n    """Return twice x."""\n'},
    {"task_id": "Example/1", "prompt": 'def is_empty(items):\n    """Whether there is nothing in items."""\n'},
    {"task_id": "Example/2", "prompt": 'def read(path):\n    """Return the text of a file."""\n    with open('},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="a folder, or a name on the Hub")
    parser.add_argument("--problems", type=Path, help="JSON lines with task_id and prompt")
    parser.add_argument("--output", type=Path, help="the file to write; without it they are printed")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()

    if args.checkpoint is None:
        model = wrap(AutoModelForCausalLM.from_pretrained(small_model_path()), num_streams=4, seed=0)
    else:
        model = load(args.checkpoint)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint or small_model_path(), padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    problems = PROBLEMS
    if args.problems is not None:
        problems = [json.loads(line) for line in args.problems.read_text(encoding="utf-8").splitlines() if line]
    samples = []
    for start in range(0, len(problems), args.batch_size):
        prompts = [problem["prompt"] for problem in problems[start : start + args.batch_size]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
        output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        written = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for problem, completion in zip(problems[start:], written, strict=False):
            body = re.split(r"\n(?=\S)", completion)[0]  # the function ends where a line is not indented
            samples.append({"task_id": problem["task_id"], "solution": problem["prompt"] + body})

    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    if args.output is None:
        sys.stdout.write(lines)
    else:
        args.output.write_text(lines, encoding="utf-8")
        print(f"{len(samples)} solutions, not yet checked, are in {args.output}.")


if __name__ == "__main__":
    main()
