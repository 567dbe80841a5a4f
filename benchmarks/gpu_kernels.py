"""The parts of `gpu_check.py` that look at one kernel at a time: its time beside its floor, and its errors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_bench import (
    Bench,
    Row,
    aggregator_tensors,
    decode_tensors,
    prefill_operations,
    prefill_tensors,
    randn,
    square_attention,
)

from parscale.kernels import (
    aggregate,
    aggregator,
    causal_attention,
    causal_attention_reference,
    decode_attention,
    shared_decode_attention,
)
from parscale.kernels.prefix import prepend


def ceilings(bench: Bench) -> None:
    """Bandwidth of a copy, bytes read and written; the rate of a product of random bfloat16 matrices; the shortest time
    that the clock shows, of a kernel in a captured graph that has nothing to do.
    """
    source = torch.empty(bench.size(2 * 2**30, 2**16), dtype=torch.int8, device=bench.device).random_()
    target = torch.empty_like(source)
    bench.ceilings["bytes_per_second"] = 2 * source.numel() / bench.seconds(lambda: target.copy_(source))
    M = bench.size(8192, 64)
    a, b = randn(bench, M, M), randn(bench, M, M)
    bench.ceilings["operations_per_second"] = 2 * M**3 / bench.seconds(lambda: a @ b)
    nothing = torch.zeros(1, device=bench.device)
    shortest = bench.seconds(bench.graphed(lambda: nothing.add_(1)))
    bench.add({"what": "ceilings", **bench.ceilings, "shortest_seconds": shortest})


# -- times


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one size.

    Attributes:
        what: its name.
        floor: seconds that any implementation takes.
        call: the operation, given `impl`.
        sizes: for the table.
    """

    what: str
    floor: float
    call: Callable[[Any], Any]
    sizes: dict[str, Any]


def attention_cases(bench: Bench) -> Iterator[Case]:
    """Decode attention in bfloat16, P = 8."""
    P = 8
    long = ((96, 1, 4096, True), (96, 1, 4096, False), (128, 1, 4096, True), (96, 8, 4096, True))
    for D, B, K, masked in (*long, (96, 1, 512, False)):
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

        yield Case("decode attention", floor, attend, {"B": B, "K": K, "D": D, "masked": masked})


def mixing_cases(bench: Bench) -> Iterator[Case]:
    """The aggregator at numbers of rows between a decoding step and a prompt, and the weighted sum alone; P = 8."""
    P = 8
    for H, N in [*((1536, n) for n in (1, 8, 33, 64, 256, 1024, 4096, 16384)), (2560, 64), (2560, 4096)]:
        H, N = bench.size(H, 32), bench.size(N, min(N, 40))
        tensors = aggregator_tensors(bench, P, N, H, torch.bfloat16)
        floor = bench.floor(2 * (P * N * H + N * H + P * H * H), 2.0 * N * P * H * H)
        call = functools.partial(_mixed, tensors)
        yield Case("aggregator", floor, call, {"N": N, "H": H})
        if bench.size(4096, 40) <= N:
            floor = bench.floor(2 * (P * N * H + N * H + N * P))
            call = functools.partial(_summed, [tensors[0], randn(bench, N, P)])
            yield Case("aggregate", floor, call, {"N": N, "H": H})


def _mixed(tensors: list[torch.Tensor], impl: Any) -> torch.Tensor:
    return aggregator(*tensors, 0.1, impl=impl)


def _summed(tensors: list[torch.Tensor], impl: Any) -> torch.Tensor:
    return aggregate(*tensors, 0.1, impl=impl)


def prefill_cases(bench: Bench) -> Iterator[Case]:
    """Attention of a prompt in bfloat16: 4 streams of 2 rows."""
    for S in (bench.size(1024, 16), bench.size(4096, 32)):
        states = prefill_tensors(bench, S)
        floor = bench.floor(2.0 * sum(t.numel() for t in states), prefill_operations(states))

        def read(impl: Any, states: Any = states) -> Any:
            return (causal_attention_reference if impl == "reference" else causal_attention)(*states)

        yield Case("prefill attention", floor, read, {"S": S})


def _times(bench: Bench, case: Case) -> Row:
    fused = bench.seconds(bench.graphed(lambda: case.call(bench.impl)))
    found = {"seconds": fused, "floor": case.floor, "of_floor": case.floor / fused}
    return found | {"eager_seconds": bench.seconds(bench.graphed(lambda: case.call("reference")))}


@torch.no_grad()
def attention(bench: Bench) -> None:
    """Decode attention against its floor, beside eager torch."""
    for case in attention_cases(bench):
        bench.figure(case.what, functools.partial(_times, bench, case), **case.sizes)


@torch.no_grad()
def mixing(bench: Bench) -> None:
    """The aggregator against its floor, beside eager torch; and what P rows cost a linear layer of the backbone."""
    for case in mixing_cases(bench):
        bench.figure(case.what, functools.partial(_times, bench, case), **case.sizes)
    H, inner = bench.size(1536, 32), bench.size(8320, 32)
    weight = randn(bench, inner, H, scale=H**-0.5)
    for M in (1, 8):
        rows = randn(bench, M, H)

        def multiply(rows: Any = rows) -> Row:
            product = bench.graphed(lambda: torch.nn.functional.linear(rows, weight))
            return {"seconds": bench.seconds(product), "floor": bench.floor(2 * H * inner)}

        bench.figure("linear layer", multiply, M=M)


@torch.no_grad()
def prefill(bench: Bench) -> None:
    """Attention of a prompt against its floor, beside eager torch and the backbone's own without a prefix."""
    for case in prefill_cases(bench):
        bench.figure(case.what, functools.partial(_times, bench, case), **case.sizes)
    for S in (bench.size(1024, 16), bench.size(4096, 32)):
        states = prefill_tensors(bench, S)[:3]

        def plain(states: Any = states) -> Row:
            return {"seconds": bench.seconds(bench.graphed(lambda: causal_without_prefix(*states)))}

        bench.figure("causal attention without prefix", plain, S=S)


def causal_without_prefix(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What the backbone does."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@torch.no_grad()
def compiled(bench: Bench) -> None:
    """torch.compile of the references, which is what the kernels compete with."""
    for cases in (attention_cases, mixing_cases, prefill_cases):
        for case in cases(bench):

            def times(case: Case = case) -> Row:
                torch._dynamo.reset()
                function = torch.compile(
                    lambda: case.call("reference"), fullgraph=True, backend="eager" if bench.dry else "inductor"
                )
                function()
                return {"seconds": bench.seconds(bench.graphed(function)), "floor": case.floor}

            bench.figure(f"{case.what}, compiled", times, **case.sizes)


def backward(bench: Bench) -> None:
    """Forward and backward of `aggregate`, aggregator and prefill attention, in bfloat16, captured."""
    P, N, H = 8, bench.size(4096, 8), bench.size(1536, 32)
    tensors = [t.requires_grad_() for t in aggregator_tensors(bench, P, N, H, torch.bfloat16)]
    logits, gradient = randn(bench, N, P).requires_grad_(), randn(bench, N, H)

    def sum_both(impl: Any) -> Any:
        return torch.autograd.grad(_summed([tensors[0], logits], impl), (tensors[0], logits), gradient)

    def mix_both(impl: Any) -> Any:
        return torch.autograd.grad(_mixed(tensors, impl)[0], tensors, gradient)

    moved = 2 * (P * N * H + N * H) + 2 * (2 * P * N * H + N * H)
    floors = (bench.floor(moved), bench.floor(moved, 6.0 * N * P * H * H))
    for what, floor, call in zip(("aggregate", "aggregator"), floors, (sum_both, mix_both), strict=True):
        case = Case(f"{what}, both ways", floor, call, {"N": N})
        bench.figure(case.what, functools.partial(_times, bench, case), **case.sizes)
    for S in (bench.size(1024, 16), bench.size(4096, 32)):
        states = [t.requires_grad_() for t in prefill_tensors(bench, S)]
        gradient = torch.ones_like(states[0])
        floor = bench.floor(0.0, 3.5 * prefill_operations(states))  # five products backward, two forward
        bench.figure("prefill attention, both ways", functools.partial(_both_ways, bench, states, gradient, floor), S=S)


def _both_ways(bench: Bench, states: list[torch.Tensor], gradient: torch.Tensor, floor: float) -> Row:
    """Of prefill attention, of its reference, and of the backbone's attention without a prefix."""
    ways = {"seconds": (causal_attention, 5), "eager_seconds": (causal_attention_reference, 5)}
    ways["plain_seconds"] = (causal_without_prefix, 3)
    found = {}
    for name, (function, n) in ways.items():
        own = states[:n]

        def both(function: Any = function, own: Any = own) -> Any:
            return torch.autograd.grad(function(*own), own, gradient)

        found[name] = bench.seconds(bench.graphed(both))
    return found | {"floor": floor, "of_floor": floor / found["seconds"]}


# -- errors


def exactness(bench: Bench) -> None:
    """Relative errors against float64 at full size: of the fused kernels, and of torch in the same precision."""
    P, N, H = 8, bench.size(4096, 40), bench.size(1536, 32)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, *weights = aggregator_tensors(bench, P, N, H, dtype)
        logits, gradient = randn(bench, N, P, dtype=dtype), randn(bench, N, H, dtype=dtype)
        states = decode_tensors(bench, P, 1, bench.size(4096, 20), bench.size(96, 8), dtype)
        prompt = prefill_tensors(bench, bench.size(1024, 16), dtype)
        cases: dict[str, tuple[Any, list[torch.Tensor], torch.Tensor | None]] = {
            "decode attention": (_attend, states, None),
            **_masked_cases(bench, dtype),
            "aggregator, 8 rows": (_mix_all, [x[:, :8], *weights], gradient[:8]),
            "aggregator": (_mix_all, [x, *weights], gradient),
            "aggregate": (_summed, [x, logits], gradient),
        }
        if dtype != torch.float32:  # which torch's flash attention does not take on a GPU
            cases["prefill attention"] = (_read, prompt, randn(bench, *prompt[0].shape, dtype=dtype))
        for name, (function, tensors, grad) in cases.items():
            find = functools.partial(_errors, bench, dtype, function, tensors, grad)
            bench.figure(f"error {name}", find, dtype=str(dtype)[6:])


def _masked_cases(bench: Bench, dtype: torch.dtype) -> dict[str, tuple[Any, list[torch.Tensor], None]]:
    """Decode attention with D = 128 and two rows, one of them padded, over own keys and over shared ones."""
    P, B, K = 8, 2, bench.size(4096, 20)
    states = decode_tensors(bench, P, B, K, bench.size(128, 8), dtype)
    query, key, value, prefix_k, prefix_v = states
    padding = torch.tensor([0, K // 3], device=bench.device).view(B, 1, 1, 1)
    mask = torch.arange(K, device=bench.device) >= padding  # (B, 1, 1, K)
    own = functools.partial(_attend, mask=mask.repeat(P, 1, 1, 1))
    shared = functools.partial(_attend_shared, mask=mask)
    return {
        "decode attention, masked": (own, states, None),
        "decode attention, shared keys": (shared, [query, key[:B], value[:B], prefix_k[1:], prefix_v[1:]], None),
    }


def _attend(tensors: list[torch.Tensor], impl: Any, mask: torch.Tensor | None = None) -> torch.Tensor:
    return decode_attention(*tensors, mask, impl=impl)


def _attend_shared(tensors: list[torch.Tensor], impl: Any, mask: torch.Tensor) -> torch.Tensor:
    return shared_decode_attention(*tensors, mask, impl=impl)


def _mix_all(tensors: list[torch.Tensor], impl: Any) -> torch.Tensor:
    return _mixed(tensors, impl)[0]


def _read(tensors: list[torch.Tensor], impl: Any) -> torch.Tensor:
    if impl != "reference":
        return causal_attention(*tensors)
    return (causal_attention_reference if tensors[0].dtype == torch.float64 else square_attention)(*tensors)


def _errors(
    bench: Bench, dtype: torch.dtype, function: Any, tensors: list[torch.Tensor], gradient: torch.Tensor | None
) -> Row:
    """The result's error and, if there is a gradient of it, those of the tensors' gradients, in their order."""
    results = []
    for impl, to in ((bench.impl, dtype), ("reference", dtype), ("reference", torch.float64)):
        own = [t.detach().to(to).requires_grad_(gradient is not None) for t in tensors]
        out = function(own, impl)
        found = () if gradient is None else torch.autograd.grad(out, own, gradient.to(to))
        results.append([out.detach(), *found])
    errors: dict[str, list[float]] = {"fused": [], "torch": []}
    for fused, reference, exact in zip(*results, strict=True):
        norm = exact.norm().item()
        for name, result in (("fused", fused), ("torch", reference)):
            errors[name].append((result.double() - exact).norm().item() / norm)
    eps = torch.finfo(dtype).eps
    ok = [own <= 2 * other + eps for own, other in zip(errors["fused"], errors["torch"], strict=True)]
    return {**errors, "ok": all(ok)}
