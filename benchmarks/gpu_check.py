"""Every figure that needs a GPU, in eight minutes, the most valuable first: decoding with a 1.8B-shaped model, each
kernel against its floor, exactness at full size, and what a training step costs beside the plain backbone's.

Each figure is written as it comes, so that a run that is cut short leaves those it has found.

    python benchmarks/gpu_check.py --output benchmarks/results/gpu.json
    python benchmarks/gpu_check.py --released FOLDER   # the released code's decoding step beside it
    python benchmarks/gpu_check.py --dry-run           # tiny sizes on any device, the figures mean nothing

A floor is the larger of two times: the bytes that must move, each input read and each output written once, at the
measured bandwidth of a copy; and the operations, two for each multiplication with its addition, at the measured rate of
a large bfloat16 product. `of_floor` is the floor's time over the measured one.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from gpu_bench import Bench, Call, aggregator_tensors, decode_tensors, prefill_operations, prefill_tensors, randn
from released import released_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from parscale import wrap
from parscale.kernels import (
    aggregate,
    aggregator,
    causal_attention,
    causal_attention_reference,
    decode_attention,
    visible_lengths,
)
from parscale.kernels.prefix import prepend

MODEL = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8320,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
TINY_MODEL = MODEL | {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def ceilings(bench: Bench) -> None:
    """Bandwidth of a copy, bytes read and written, and the rate of a product of random bfloat16 matrices."""
    source = torch.empty(bench.size(2 * 2**30, 2**16), dtype=torch.int8, device=bench.device).random_()
    target = torch.empty_like(source)
    bench.ceilings["bytes_per_second"] = 2 * source.numel() / bench.seconds(lambda: target.copy_(source))
    M = bench.size(8192, 64)
    a, b = randn(bench, M, M), randn(bench, M, M)
    bench.ceilings["operations_per_second"] = 2 * M**3 / bench.seconds(lambda: a @ b)
    bench.add("ceilings", **bench.ceilings)


def exactness(bench: Bench) -> None:
    """Relative errors against float64 at full size: of the fused kernels, and of torch in the same precision."""
    P, N, H = 8, bench.size(4096, 40), bench.size(1536, 32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, w1, b1, w2, b2 = aggregator_tensors(bench, P, N, H, dtype)
        logits, gradient = randn(bench, N, P, dtype=dtype), randn(bench, N, H, dtype=dtype)
        K, D = bench.size(4096, 20), bench.size(96, 8)
        states = decode_tensors(bench, P, 1, K, D, dtype)

        def mix(x: torch.Tensor, logits: torch.Tensor, impl: Any) -> torch.Tensor:
            return aggregate(x, logits, 0.1, impl=impl)

        def whole(*tensors: Any) -> torch.Tensor:
            *tensors, impl = tensors
            return aggregator(*tensors, 0.1, impl=impl)[0]

        def few(*tensors: Any) -> torch.Tensor:
            x, *weights, impl = tensors
            return aggregator(x[:, :8], *weights, 0.1, impl=impl)[0]

        def attend(*tensors: Any) -> torch.Tensor:
            *tensors, impl = tensors
            return decode_attention(*tensors, None, impl=impl)

        def read(*tensors: Any) -> torch.Tensor:
            *tensors, impl = tensors
            return (causal_attention_reference if impl == "reference" else causal_attention)(*tensors)

        prefill = prefill_tensors(bench, bench.size(1024, 16), dtype)
        cases: dict[str, tuple[Any, list[torch.Tensor], Any]] = {
            "aggregate": (mix, [x, logits], gradient),
            "aggregator": (whole, [x, w1, b1, w2, b2], gradient),
            "aggregator, 8 rows": (few, [x, w1, b1, w2, b2], gradient[:8]),
            "decode attention": (attend, states, None),
        }
        if dtype != torch.float32:  # which torch's flash attention does not take on a GPU
            cases["prefill attention"] = (read, prefill, randn(bench, *prefill[0].shape, dtype=dtype))
        for name, (function, tensors, grad) in cases.items():
            results = []
            for impl, to in ((bench.impl, dtype), ("reference", dtype), ("reference", torch.float64)):
                own = [t.to(to).requires_grad_(grad is not None) for t in (u.detach() for u in tensors)]
                out = function(*own, impl)
                grads = () if grad is None else torch.autograd.grad(out, own, grad.to(to))
                results.append([out.detach(), *grads])
            for which, fused, reference, exact in zip(("forward", *"abcde"), *results, strict=False):
                norm = exact.norm().item()
                errors = [(t.double() - exact).norm().item() / norm for t in (fused, reference)]
                which = which if which == "forward" else f"gradient {'abcde'.index(which)}"
                ok = errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps
                kind = str(dtype)[6:]
                bench.add(f"error {name}", of=which, dtype=kind, fused=errors[0], torch=errors[1], ok=ok)


def kernels(bench: Bench) -> None:
    """Each kernel against its floor, eager torch and torch.compile, in bfloat16."""
    P = 8

    def compare(what: str, floor: float, call: Callable[[Any], Any], **sizes: Any) -> None:
        fused = bench.seconds(bench.graphed(lambda: call(bench.impl)))
        eager = bench.seconds(bench.graphed(lambda: call("reference")))
        found: dict[str, Any] = {"seconds": fused, "floor": floor, "of_floor": floor / fused, "eager_seconds": eager}
        if not bench.dry:
            torch._dynamo.reset()
            compiled = torch.compile(lambda: call("reference"), fullgraph=True)
            compiled()
            found["compiled_seconds"] = bench.seconds(bench.graphed(compiled))
        bench.add(what, **sizes, **found)

    with torch.no_grad():
        for D, B, K, masked in ((96, 1, 4096, True), (96, 1, 4096, False), (128, 1, 4096, True), (96, 8, 4096, True)):
            D, K = bench.size(D, 8), bench.size(K, 20)
            states = decode_tensors(bench, P, B, K, D)
            mask = torch.ones(P * B, 1, 1, 48 + K, dtype=torch.bool, device=bench.device) if masked else None
            floor = bench.floor(2.0 * sum(t.numel() for t in states) + (0 if mask is None else mask.numel()))

            def attend(impl: Any, states: Any = states, mask: Any = mask) -> Any:
                if impl == bench.impl:
                    return decode_attention(*states, mask, impl=impl)
                query, key, value, prefix_k, prefix_v = states
                keys, values = prepend(prefix_k, key), prepend(prefix_v, value)
                return torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)

            compare("decode attention", floor, attend, B=B, K=K, D=D, masked=masked)
        for H, N in [*((1536, n) for n in (1, 8, 33, 64, 256, 1024, 4096, 16384)), (2560, 64), (2560, 4096)]:
            H, N = bench.size(H, 32), bench.size(N, min(N, 40))
            tensors = aggregator_tensors(bench, P, N, H, torch.bfloat16)
            floor = bench.floor(2 * (P * N * H + N * H + P * H * H), 2.0 * N * P * H * H)
            compare("aggregator", floor, lambda impl, t=tensors: aggregator(*t, 0.1, impl=impl), N=N, H=H)
            if bench.size(4096, 40) <= N:
                x, logits = tensors[0], randn(bench, N, P)
                floor = bench.floor(2 * (P * N * H + N * H + N * P))
                mix = functools.partial(aggregate, x, logits, 0.1)
                compare("aggregate", floor, lambda impl, mix=mix: mix(impl=impl), N=N, H=H)
        H, inner = bench.size(1536, 32), bench.size(8320, 32)
        weight = randn(bench, inner, H, scale=H**-0.5)
        for M in (1, 8):  # what P rows cost a linear layer of the backbone
            rows = randn(bench, M, H)
            product = bench.graphed(lambda rows=rows: torch.nn.functional.linear(rows, weight))
            bench.add("linear layer", M=M, seconds=bench.seconds(product), floor=bench.floor(2 * H * inner))
        for S in (bench.size(1024, 16), bench.size(4096, 32)):
            states = prefill_tensors(bench, S)
            floor = bench.floor(2.0 * sum(t.numel() for t in states), prefill_operations(states))

            def read(impl: Any, states: Any = states) -> Any:
                return (causal_attention_reference if impl == "reference" else causal_attention)(*states)

            compare("prefill attention", floor, read, S=S)
            plain = bench.graphed(lambda states=states: causal_without_prefix(*states[:3]))
            bench.add("causal attention without prefix", S=S, seconds=bench.seconds(plain))


def causal_without_prefix(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What the backbone does."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def backward(bench: Bench) -> None:
    """Forward and backward of `aggregate`, aggregator and prefill attention, in bfloat16, captured."""
    P, N, H = 8, bench.size(4096, 8), bench.size(1536, 32)
    tensors = [t.requires_grad_() for t in aggregator_tensors(bench, P, N, H, torch.bfloat16)]
    logits, gradient = randn(bench, N, P).requires_grad_(), randn(bench, N, H)

    def mix(impl: Any) -> Any:
        return torch.autograd.grad(aggregate(tensors[0], logits, 0.1, impl=impl), (tensors[0], logits), gradient)

    def whole(impl: Any) -> Any:
        return torch.autograd.grad(aggregator(*tensors, 0.1, impl=impl)[0], tensors, gradient)

    moved = 2 * (P * N * H + N * H) + 2 * (2 * P * N * H + N * H)
    floors = {"aggregate": bench.floor(moved), "aggregator": bench.floor(moved, 6.0 * N * P * H * H)}
    for name, function in (("aggregate", mix), ("aggregator", whole)):
        ways = [bench.graphed(lambda f=function, i=i: f(i)) for i in (bench.impl, "reference")]
        fused, eager = map(bench.seconds, ways)
        of_floor = floors[name] / fused
        bench.add(f"{name}, both ways", N=N, seconds=fused, floor=floors[name], of_floor=of_floor, eager_seconds=eager)
    for S in (bench.size(1024, 16), bench.size(4096, 32)):
        states = [t.requires_grad_() for t in prefill_tensors(bench, S)]
        gradient = torch.ones_like(states[0])
        floor = bench.floor(0.0, 3.5 * prefill_operations(states))  # five products backward, two forward
        ways = {"seconds": (causal_attention, 5), "eager_seconds": (causal_attention_reference, 5)}
        ways["plain_seconds"] = (causal_without_prefix, 3)
        found = {}
        for name, (function, n) in ways.items():

            def both(f: Any = function, own: Any = states[:n], gradient: Any = gradient) -> Any:
                return torch.autograd.grad(f(*own), own, gradient)

            found[name] = bench.seconds(bench.graphed(both))
        bench.add("prefill attention, both ways", S=S, floor=floor, of_floor=floor / found["seconds"], **found)


def model_of(bench: Bench, P: int, attention: str = "sdpa", kv: str = "own") -> Any:
    torch.manual_seed(0)
    shape = TINY_MODEL if bench.dry else MODEL
    config = transformers.Qwen2Config(**shape, attn_implementation=attention, dtype=torch.bfloat16)
    with torch.device(bench.device):
        model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    return wrap(model, P, init="random", seed=0, kv=kv) if P > 1 else model


def own_decode(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    """The plain backbone's attention by our kernel, which splits a sequence; torch's with a mask does not."""
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    nothing = key.new_empty(1, key.shape[1], 0, key.shape[3])
    length = None if attention_mask is None else visible_lengths(attention_mask)
    scaling = kwargs.get("scaling")
    mixed = decode_attention(query, key, value, nothing, nothing, attention_mask, length=length, scaling=scaling)
    return mixed.transpose(1, 2), None


def captured_step(bench: Bench, model: Any, length: int, is_compiled: bool) -> Call:
    """One decoding step after `length` tokens with a static cache, as a CUDA graph."""
    # every replay appends a token: room for those that warm up and those that are timed
    cache = transformers.StaticCache(config=model.config, max_cache_len=length + 128)
    ids = torch.randint(0, 64, (1, length), device=bench.device)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    position = torch.tensor([[length]], device=bench.device)

    def step() -> Any:
        return model(ids[:, :1], position_ids=position, past_key_values=cache, use_cache=True).logits

    return bench.graphed(torch.compile(step) if is_compiled and not bench.dry else step)


@torch.no_grad()
def decoding(bench: Bench) -> None:
    """The captured step at several lengths and numbers of streams, batch 1, beside what the weights alone need."""
    transformers.AttentionInterface.register("own_decode", own_decode)
    transformers.AttentionMaskInterface.register("own_decode", sdpa_mask)
    plain: dict[int, dict[str, float]] = {}
    ways = [(1, "sdpa", "own"), (1, "own_decode", "own")]
    ways += [(P, "sdpa", kv) for P in (8, 4, 2) for kv in ("own", "shared")]
    for P, attention, kv in ways:
        model = model_of(bench, P, attention, kv).eval()
        floor = bench.floor(2 * sum(p.numel() for p in model.parameters()))
        for length in (bench.size(512, 8), bench.size(4096, 16), bench.size(16384, 24)):
            seconds = bench.seconds(captured_step(bench, model, length, is_compiled=False))
            if P == 1:
                plain.setdefault(length, {})[f"to_P1_by_{attention}"] = seconds
            ratios = {name: seconds / other for name, other in plain[length].items()}
            sizes = {"P": P, "kv": kv, "attention": attention, "length": length}
            bench.add("step", **sizes, seconds=seconds, weights_floor=floor, **ratios)
        del model


@torch.no_grad()
def compiled_decoding(bench: Bench) -> None:
    """The compiled step and the whole of `generate`, P = 1 and 8, and the step of the released code."""
    length, tokens = bench.size(512, 8), bench.size(64, 4)
    first: dict[str, float] = {}
    for P in (1, 8):
        model = model_of(bench, P).eval()
        found: dict[str, Any] = {"step_seconds": bench.seconds(captured_step(bench, model, length, is_compiled=True))}
        ids = torch.randint(0, 64, (1, length), device=bench.device)
        options = {} if bench.dry else {"cache_implementation": "static"}

        def generate(new: int, model: Any = model, ids: Any = ids, options: Any = options) -> float:
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)
            if not bench.dry:
                torch.cuda.synchronize()
            return time.perf_counter() - start

        generate(tokens)  # compiles
        long, short = (statistics.median(generate(n) for _ in range(3)) for n in (tokens, 2))
        found["generate_seconds_per_token"] = (long - short) / (tokens - 2)
        for name in ("step_seconds", "generate_seconds_per_token"):
            first.setdefault(name, found[name])
            found[f"{name}_to_P1"] = found[name] / first[name]
        bench.add("decoding", P=P, length=length, **found)
        del model
    if bench.released is not None:
        seconds = released_step(bench, length)
        faster = {f"{name}_faster": seconds / found[name] for name in ("step_seconds", "generate_seconds_per_token")}
        bench.add("decoding by the released code", P=8, step_seconds=seconds, **faster)


def released_step(bench: Bench, length: int) -> float:
    """Seconds of one decoding step of the released code, P = 8, as it runs: from Python, with a cache that grows."""
    with torch.device(bench.device):
        model = released_model(bench.released, TINY_MODEL if bench.dry else MODEL, P=8).to(torch.bfloat16).eval()
    ids = torch.randint(0, 64, (1, length), device=bench.device)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        return bench.seconds(lambda: model(ids[:, :1], past_key_values=cache, use_cache=True))


def training(bench: Bench) -> None:
    """A training step beside the plain backbone's at batch P*B with B rows of loss, in bfloat16, captured."""
    P, S = 4, bench.size(1024, 8)
    times = {}
    for streams in (P, 1):
        model = model_of(bench, streams).train()
        ids = torch.randint(0, 64, (1, S), device=bench.device)

        parameters = list(model.parameters())

        def step(model: Any = model, ids: Any = ids, streams: int = streams, parameters: Any = parameters) -> Any:
            if streams > 1:
                logits = model(ids).logits
            else:
                logits = model.lm_head(model.model(ids.repeat(P, 1))[0][:1])
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            return torch.autograd.grad(loss, parameters)

        times[streams] = bench.seconds(bench.graphed(step), repeats=9)
        del model, parameters, step
    bench.add("training", P=P, S=S, seconds=times[P], plain_seconds=times[1], ratio=times[P] / times[1])


PARTS = {f.__name__: f for f in (ceilings, decoding, kernels, exactness, training, backward, compiled_decoding)}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The share of its floor that each kernel reaches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = [row for row in rows if "of_floor" in row]
    names = [row["what"] + "".join(f", {k} {row[k]}" for k in ("N", "H", "B", "K", "D") if k in row) for row in chosen]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(names) + 1))
    axes.barh(names, [100 * row["of_floor"] for row in chosen], label="fused")
    for key, mark in (("eager_seconds", "|"), ("compiled_seconds", "x")):
        found = [(name, 100 * row["floor"] / row[key]) for name, row in zip(names, chosen, strict=True) if key in row]
        if found:
            axes.plot([x for _, x in found], [name for name, _ in found], mark, color="black", label=key[:-8])
    axes.set(xlabel="per cent of the floor's speed", xlim=(0, 105))
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def runs(bench: Bench, part: Callable[[Bench], None]) -> bool:
    """Whether a part runs through; one that fails does not take the others with it."""
    try:
        part(bench)
    except Exception as error:
        if bench.dry:
            raise
        bench.add("failed", part=part.__name__, error=f"{type(error).__name__}: {error}"[:500])
        return False
    finally:
        if not bench.dry:
            torch.cuda.empty_cache()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to see that everything runs")
    parser.add_argument("--released", type=Path, help="folder of the released modeling code, to time it too")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS), help="parts to run")
    parser.add_argument("--output", type=Path, help="JSON file for the results; a plot goes beside it")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("gpu_check needs a CUDA or ROCm device, and torch sees none; --dry-run needs none.")
    bench = Bench(args.dry_run, args.released, args.output)
    failed = [name for name, part in PARTS.items() if name in {*args.only, "ceilings"} and not runs(bench, part)]
    if args.output is None:
        print(bench.json())
    else:
        plot(bench.rows, args.output.with_suffix(".png"))
    wrong = [row for row in bench.rows if row.get("ok") is False]
    if failed or (wrong and not args.dry_run):
        sys.exit(f"Failed: {', '.join(failed) or 'none'}; {len(wrong)} errors above twice torch's own.")


if __name__ == "__main__":
    main()
