r"""What serving costs: vLLM with streams beside vLLM on the plain backbone, and beside transformers' `generate`.

Every engine has a process of its own, all of them live, and take turns on the same prompts of random tokens, new ones
in each turn, so that prefix caching finds only what all requests share. Of each engine the turn with the highest
throughput counts, and the one with the shortest time to the first token; a further token takes what is left of the one
after the other, divided by their number. Requests come all at once; transformers gets a batch.

    .venv-vllm/bin/python benchmarks/serving.py --output benchmarks/results/serving.json
    .venv-vllm/bin/python benchmarks/serving.py --table benchmarks/results/serving.json

Streams with keys and values of their own beside streams that share them, by vLLM alone:

    .venv-vllm/bin/python benchmarks/serving.py --kv own shared --programs vllm --streams 2 4 \
        --prompt-tokens 1024 --output benchmarks/results/serving_shared.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import processor
from overhead import SHAPE

PLAIN = "plain"  # the backbone, as vLLM's own class serves it


def named(P: int, kv: str) -> str:
    """A model's name: P streams, and whose keys and values they attend to."""
    return f"{P}-{kv}"


def models(streams: list[int], kvs: list[str]) -> list[tuple[int, str]]:
    """Pairs of P and `kv`; one stream has no keys to share."""
    return [(P, kv) for kv in kvs for P in streams if P > 1 or kv == kvs[0]]


def engines(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Pairs of a program and a model."""
    names = [named(*model) for model in models(args.streams, args.kv)]
    return [("vllm", PLAIN), *((program, name) for program in args.programs for name in names)]


def save_models(folder: Path, model: Any, streams: list[int], kvs: list[str]) -> None:
    """A backbone, and the same with P streams for each P."""
    import parscale

    model.save_pretrained(folder / PLAIN)
    for P, kv in models(streams, kvs):
        parscale.wrap(model, P, init="random", seed=0, kv=kv)
        model.save_pretrained(folder / named(P, kv))
        parscale.unwrap(model)


def random_prompts(number: int, length: int, vocabulary: int, generator: torch.Generator) -> list[list[int]]:
    """Prompts of random tokens."""
    return torch.randint(vocabulary, (number, length), generator=generator).tolist()


class Vllm:
    """vLLM's engine in this process."""

    def __init__(self, folder: str, args: argparse.Namespace) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        from vllm import LLM, SamplingParams

        self.llm = LLM(
            folder,
            dtype=args.dtype,
            max_model_len=2 * (args.prompt_tokens + args.new_tokens),
            max_num_seqs=max(args.concurrency),
            block_size=args.block_size,
            skip_tokenizer_init=True,
            disable_log_stats=False,
        )
        self.wanted = SamplingParams(temperature=0, ignore_eos=True, max_tokens=args.new_tokens, detokenize=False)

    def answer(self, prompts: list[list[int]]) -> float:
        """Mean seconds to the first token."""
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self.llm.generate(requests, self.wanted, use_tqdm=False)
        return sum(output.metrics.first_token_latency for output in outputs) / len(outputs)


class Transformers:
    """`generate` on a batch."""

    def __init__(self, folder: str, args: argparse.Namespace) -> None:
        import parscale

        self.model = parscale.load(folder, dtype=getattr(torch, args.dtype)).eval()
        self.new = args.new_tokens

    def answer(self, prompts: list[list[int]]) -> float:
        """Seconds to the first token."""
        ids, times = torch.tensor(prompts), []

        def remember(*_: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(prompts), dtype=torch.bool)

        start = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=self.new,
                max_new_tokens=self.new,
                pad_token_id=0,
                stopping_criteria=[remember],
            )
        return times[0] - start


def work(program: str, folder: str, args: argparse.Namespace) -> None:
    """Answers lines of prompts on the standard input by lines of seconds, until there are no more."""
    torch.set_num_threads(args.threads)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    engine = {"vllm": Vllm, "transformers": Transformers}[program](folder, args)
    print("ready", file=out)
    for line in sys.stdin:
        prompts = json.loads(line)
        engine.answer([prompts[0][::-1]])  # brings the weights back that other engines have driven out of the caches
        start = time.perf_counter()
        first = engine.answer(prompts)
        print(json.dumps({"seconds": time.perf_counter() - start, "first": first}), file=out)


class Engine:
    """A program on a model, in a process of its own.

    Args:
        program: of `work`.
        folder: the model's.
        options: of this script's command line.

    Raises:
        RuntimeError: it has ended before it was ready; it says why on the standard error.
    """

    def __init__(self, program: str, folder: str | Path, options: list[str]) -> None:
        command = [sys.executable, __file__, *options, "--work", program, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._next_line() != "ready\n":
            raise RuntimeError(f"{program} did not start on {folder}")

    def answer(self, prompts: list[list[int]]) -> dict[str, float]:
        """Seconds until all prompts are answered, and until the first token, in the mean."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(prompts) + "\n")
        self.process.stdin.flush()
        found: dict[str, float] = json.loads(self._next_line())
        return found

    def stop(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()

    def _next_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each engine and number of requests at once."""
    best: dict[tuple[str, str, int], dict[str, float]] = {}
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE)).to(getattr(torch, args.dtype))
        save_models(Path(folder), model, args.streams, args.kv)
        live = {}
        for name in engines(args):
            live[name] = Engine(name[0], f"{folder}/{name[1]}", sys.argv[1:])
            stack.callback(live[name].stop)
        for turn in range(args.turns + 1):
            for number in args.concurrency:
                prompts = random_prompts(number, args.prompt_tokens, SHAPE["vocab_size"], generator)
                for name in live if turn % 2 else reversed(live):
                    found = live[name].answer(prompts)
                    print(f"{turn} {name} {number:3} {found}", file=sys.stderr)
                    if turn:  # the first is to warm up
                        old = best.get((*name, number), found)
                        best[*name, number] = {key: min(old[key], found[key]) for key in found}
    return [
        {"program": program, "model": model, "concurrency": number, **found}
        | {"tokens_per_second": number * args.new_tokens / found["seconds"]}
        for (program, model, number), found in best.items()
    ]


def table(result: dict[str, Any]) -> str:
    """Throughput and time to the first token as ratios, in Markdown."""
    new = result["new_tokens"]
    rows = {
        (row["program"], row["model"], row["concurrency"]): row
        | {"token": (row["seconds"] - row["first"]) / (new - 1), "rate": row["tokens_per_second"]}
        for row in result["rows"]
    }
    has_generate = "transformers" in result["programs"]
    others = ("plain vLLM", "`generate`") if has_generate else ("plain vLLM",)
    titles = ["P", "keys", "requests at once"]
    titles += [f"{what}, to {other}" for other in others for what in ("tokens/s", "first token", "further token")]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for P, kv in models(result["streams"], result["kv"]):
        for number in result["concurrency"]:
            own = rows["vllm", named(P, kv), number]
            cells = []
            for other in (("vllm", PLAIN), ("transformers", named(P, kv)))[: len(others)]:
                against = rows[*other, number]
                cells += [own[what] / against[what] for what in ("rate", "first", "token")]
            lines.append(f"| {P} | {kv} | {number} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4], help="values of P")
    parser.add_argument("--kv", nargs="+", choices=["own", "shared"], default=["own"], help="whose keys and values")
    parser.add_argument(
        "--programs", nargs="+", choices=["vllm", "transformers"], default=["vllm", "transformers"], help="what serves"
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], help="requests at once")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--block-size", type=int, help="tokens in a block of vLLM's cache; without it, vLLM's choice")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--table", type=Path, help="print the table of such a file")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    if args.work:
        work(*args.work, args)
        return
    import vllm

    result = {
        "processor": processor(),
        "threads": args.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vllm": vllm.__version__,
        "shape": SHAPE,
        **{name: getattr(args, name) for name in ("dtype", "block_size", "prompt_tokens", "new_tokens", "turns")},
        "streams": args.streams,
        "kv": args.kv,
        "programs": args.programs,
        "concurrency": args.concurrency,
        "rows": measure(args),
    }
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
