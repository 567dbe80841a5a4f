r"""What serving costs: vLLM with streams beside vLLM on the plain backbone, and beside transformers' `generate`.

Every engine has a process of its own, all of them live, and take turns on the same prompts of random tokens, new ones
in each turn, so that prefix caching finds only what all requests share. Requests of a load come all at once;
transformers gets a batch. Of each engine the shortest time to the first token counts, the shortest time of a further
one, and the turn with the highest throughput.

    .venv-vllm/bin/python benchmarks/serving.py --output benchmarks/results/serving.json
    .venv-vllm/bin/python benchmarks/serving.py --table benchmarks/results/serving.json
    .venv-vllm/bin/python benchmarks/serving.py --streams 4 --kv own --programs vllm transformers --loads 1x128 32x128
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from machine import surroundings
from overhead import SHAPE

PLAIN = "plain"  # the backbone, as vLLM's own class serves it
STARTING = 2  # engines that start at the same time
CACHE_BYTES = 2**29  # of an engine on CPUs, where all of them share the memory
WAKING = 64  # tokens that an engine reads before each turn


class Load(NamedTuple):
    """Requests that come at once.

    Attributes:
        requests: their number.
        prompt: tokens of each.
    """

    requests: int
    prompt: int

    def __str__(self) -> str:
        return f"{self.requests}x{self.prompt}"


def load(text: str) -> Load:
    """Such as `"8x256"`: eight requests of 256 tokens each."""
    requests, prompt = map(int, text.split("x"))
    return Load(requests, prompt)


class Times(NamedTuple):
    """Seconds to the first token, and from one token to the next; of several requests the means."""

    first: float
    further: float


def named(P: int, kv: str) -> str:
    """A model's name: P streams, and whose keys and values they attend to."""
    return f"{P}-{kv}"


def models(streams: list[int], kvs: list[str]) -> list[tuple[int, str]]:
    """Pairs of P and `kv`; one stream has no keys to share."""
    return [(P, kv) for P in streams for kv in kvs if P > 1 or kv == kvs[0]]


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


def longest(args: argparse.Namespace) -> int:
    """Tokens of the longest prompt with its answer."""
    return max(load.prompt for load in args.loads) + args.new_tokens


def random_prompts(load: Load, vocabulary: int, generator: torch.Generator) -> list[list[int]]:
    """Prompts of random tokens."""
    return torch.randint(vocabulary, load, generator=generator).tolist()


class Vllm:
    """vLLM's engine in this process."""

    def __init__(self, folder: str, args: argparse.Namespace) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        from vllm import LLM, SamplingParams

        of_cpus = {} if torch.cuda.is_available() else {"kv_cache_memory_bytes": CACHE_BYTES}
        self.llm = LLM(
            folder,
            **of_cpus,
            dtype=args.dtype,
            max_model_len=longest(args),
            max_num_seqs=max(load.requests for load in args.loads),
            block_size=args.block_size,
            skip_tokenizer_init=True,
            disable_log_stats=False,
        )
        self.new = args.new_tokens
        self.wanted = SamplingParams(temperature=0, ignore_eos=True, max_tokens=self.new, detokenize=False)

    def answer(self, prompts: list[list[int]]) -> Times:
        """By the engine's own clock."""
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        times = [output.metrics for output in self.llm.generate(requests, self.wanted, use_tqdm=False)]
        first = sum(time.first_token_latency for time in times) / len(times)
        further = sum(time.last_token_ts - time.first_token_ts for time in times) / len(times)
        return Times(first, further / (self.new - 1))


class Transformers:
    """`generate` on a batch."""

    def __init__(self, folder: str, args: argparse.Namespace) -> None:
        import parscale

        self.model = parscale.load(folder, dtype=getattr(torch, args.dtype)).eval()
        self.new = args.new_tokens

    def answer(self, prompts: list[list[int]]) -> Times:
        """Of the batch."""
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
        return Times(times[0] - start, (times[-1] - times[0]) / (self.new - 1))


def work(program: str, folder: str, args: argparse.Namespace) -> None:
    """Answers lines of prompts on the standard input by lines of seconds, until there are no more."""
    torch.set_num_threads(args.threads)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    engine = {"vllm": Vllm, "transformers": Transformers}[program](folder, args)
    print("ready", file=out)
    for line in sys.stdin:
        prompts = json.loads(line)
        engine.answer([prompts[0][: -WAKING - 1 : -1]])  # brings back the weights that others have driven out of caches
        start = time.perf_counter()
        times = engine.answer(prompts)
        print(json.dumps({"seconds": time.perf_counter() - start, **times._asdict()}), file=out)


class Engine:
    """A program on a model, in a process of its own.

    Args:
        program: of `work`.
        folder: the model's.
        options: of this script's command line.

    Raises:
        RuntimeError: it has ended before it was ready; it says why on the standard error.
    """

    def __init__(self, program: str, folder: str | Path, options: Sequence[str]) -> None:
        command = [sys.executable, __file__, *options, "--work", program, str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._next_line() != "ready\n":
            raise RuntimeError(f"{program} did not start on {folder}")

    def answer(self, prompts: list[list[int]]) -> dict[str, float]:
        """Seconds until all prompts are answered, and `Times`."""
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
    """One row for each engine and load."""
    best: dict[tuple[str, str, Load], dict[str, float]] = {}
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        torch.manual_seed(0)
        config = transformers.Qwen2Config(**SHAPE | {"max_position_embeddings": longest(args)})
        model = transformers.Qwen2ForCausalLM(config).to(getattr(torch, args.dtype))
        save_models(Path(folder), model, args.streams, args.kv)
        del model

        def start(name: tuple[str, str]) -> Engine:
            engine = Engine(name[0], f"{folder}/{name[1]}", sys.argv[1:])
            stack.callback(engine.stop)
            return engine

        names = engines(args)
        with ThreadPoolExecutor(STARTING) as pool:
            live = dict(zip(names, pool.map(start, names), strict=True))
        for turn, load in itertools.product(range(args.turns + 1), args.loads):
            prompts = random_prompts(load, SHAPE["vocab_size"], generator)
            for name in live if turn % 2 else reversed(live):
                found = live[name].answer(prompts)
                print(f"{turn} {name} {load} {found}", file=sys.stderr)
                if turn:  # the first is to warm up
                    old = best.get((*name, load), found)
                    best[*name, load] = {key: min(old[key], found[key]) for key in found}
    return [
        {"program": program, "model": model, **load._asdict(), **found}
        | {"tokens_per_second": load.requests * args.new_tokens / found["seconds"]}
        for (program, model, load), found in best.items()
    ]


def table(result: dict[str, Any]) -> str:
    """Throughput and times as ratios, in Markdown."""
    rows = {(row["program"], row["model"], Load(row["requests"], row["prompt"])): row for row in result["rows"]}
    has_generate = "transformers" in result["programs"]
    others = ("plain vLLM", "`generate`") if has_generate else ("plain vLLM",)
    titles = ["P", "keys", "prompt, tokens", "requests at once"]
    titles += [f"{what}, to {other}" for other in others for what in ("first token", "further token", "tokens/s")]
    has_both = result["kv"] == ["own", "shared"]
    titles += ["further token, shared to own"] if has_both else []
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for values, (P, kv) in itertools.product(result["loads"], models(result["streams"], result["kv"])):
        load = Load(*values)
        own, cells = rows["vllm", named(P, kv), load], []
        for other in (("vllm", PLAIN), ("transformers", named(P, kv)))[: len(others)]:
            against = rows[*other, load]
            cells += [own[what] / against[what] for what in ("first", "further", "tokens_per_second")]
        ratios = " | ".join(f"{cell:.2f}" for cell in cells)
        if has_both:
            with_own = rows["vllm", named(P, "own"), load]["further"]
            ratios += f" | {own['further'] / with_own:.2f}" if kv == "shared" else " | "
        lines.append(f"| {P} | {kv} | {load.prompt} | {load.requests} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[2, 4, 8], help="values of P")
    parser.add_argument(
        "--kv", nargs="+", choices=["own", "shared"], default=["own", "shared"], help="whose keys and values"
    )
    parser.add_argument(
        "--programs", nargs="+", choices=["vllm", "transformers"], default=["vllm"], help="what serves the streams"
    )
    parser.add_argument(
        "--loads",
        type=load,
        nargs="+",
        default=[Load(1, 256), Load(8, 256), Load(1, 4096)],
        help="requests at once, x, tokens of each prompt",
    )
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
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
        **surroundings("cpu", args.threads),
        "vllm": vllm.__version__,
        "shape": SHAPE,
        **{name: getattr(args, name) for name in ("dtype", "block_size", "new_tokens", "turns")},
        **{name: getattr(args, name) for name in ("streams", "kv", "programs", "loads")},
        "rows": measure(args),
    }
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
