"""What each Triton kernel takes on each GPU architecture, compiled here, without a GPU.

The host functions run on tensors without data, their launches are recorded, and exactly these are compiled: the table
shows the configurations that ship.

    python benchmarks/compile_targets.py --output benchmarks/results/kernels.json
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from assembly import blocking_loads, cuobjdump, read_sass
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from parscale.kernels.launch import Gpu


@dataclasses.dataclass(frozen=True)
class Target:
    """What code is compiled for, and a GPU of that kind, for the choices of the host functions."""

    compiler: GPUTarget
    gpu: Gpu
    threads: int = 2048  # of a multiprocessor


KIB = 1024
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), Gpu(108, 164 * KIB)),  # A100
    "sm_89": Target(GPUTarget("cuda", 89, 32), Gpu(142, 100 * KIB), 1536),  # L40S
    "sm_90": Target(GPUTarget("cuda", 90, 32), Gpu(132, 228 * KIB, dependent_launch=True)),  # H100
    "sm_100": Target(GPUTarget("cuda", 100, 32), Gpu(148, 228 * KIB, dependent_launch=True)),  # B200
    "sm_120": Target(GPUTarget("cuda", 120, 32), Gpu(188, 100 * KIB, dependent_launch=True), 1536),  # RTX PRO 6000
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), Gpu(304, 64 * KIB, is_hip=True)),  # MI300X
}
MODULES = ("aggregate", "aggregator", "decode_attention")
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


OPTIONS = ("num_warps", "num_stages", "launch_pdl")


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What users run: a name, and a call of the host functions."""
    fused = importlib.import_module("parscale.kernels.aggregate.fused")
    for P, H, dtype in (
        (2, 896, torch.bfloat16),
        (4, 2048, torch.float16),
        (8, 1536, torch.bfloat16),
        (8, 1536, torch.float32),
        (8, 1536, torch.float64),
        (5, 1000, torch.bfloat16),
        (64, 1536, torch.bfloat16),
        (1, 1, torch.float32),  # Triton compiles a 1 into the kernel
    ):
        N = 4096 if H > 1 else 1
        x, logits, gradient = (empty(*size, dtype=dtype) for size in ((P, N, H), (N, P), (N, H)))
        name = f"aggregate P={P} H={H} {str(dtype)[6:]}"
        yield name, lambda x=x, logits=logits: fused.forward(x, logits, 0.1)
        yield name, lambda x=x, logits=logits, gradient=gradient: fused.backward(gradient, x, logits, 0.1)
    fused = importlib.import_module("parscale.kernels.aggregator.fused")
    for P, N, H, dtype in (
        (8, 1, 1536, torch.bfloat16),
        (4, 32, 2048, torch.float16),
        (8, 8, 1536, torch.float32),
        (5, 1, 1000, torch.bfloat16),
        (2, 4096, 896, torch.bfloat16),
        (8, 4096, 1536, torch.bfloat16),
        (4, 16384, 2048, torch.float16),
        (8, 64, 1536, torch.bfloat16),
        (5, 64, 1536, torch.bfloat16),
        (1, 1, 1, torch.bfloat16),
        (1, 40, 1, torch.bfloat16),
    ):
        x, *weights = (empty(*size, dtype=dtype) for size in ((P, N, H), (H, H * P), (H,), (P, H), (P,)))
        name = f"aggregator P={P} N={N} H={H} {str(dtype)[6:]}"
        for save in (False, True):
            yield name, lambda x=x, weights=weights, save=save: fused.forward(x, *weights, 0.1, save)
        yield name, lambda weights=weights, P=P: fused.split_streams(weights[0], P)
    fused = importlib.import_module("parscale.kernels.decode_attention.fused")
    for P, B, G, n, D, V, K, dtype, kind in (
        (8, 1, 2, 8, 96, 96, 4096, torch.bfloat16, "boolean"),
        (8, 1, 2, 8, 96, 96, 4096, torch.bfloat16, "none"),
        (8, 1, 2, 8, 96, 96, 4096, torch.float32, "boolean"),
        (4, 8, 8, 4, 64, 64, 1000, torch.float16, "additive"),
        (4, 8, 8, 8, 64, 64, 1000, torch.bfloat16, "sinks"),
        (4, 1, 8, 4, 128, 128, 4096, torch.bfloat16, "boolean"),
        (4, 1, 16, 1, 192, 128, 4096, torch.bfloat16, "additive"),
        (2, 1, 8, 2, 256, 256, 4096, torch.bfloat16, "softcap"),
        (2, 1, 1, 32, 256, 256, 4096, torch.float32, "per head"),
        (8, 64, 8, 4, 128, 128, 4096, torch.bfloat16, "boolean"),
        (1, 1, 1, 1, 16, 16, 1, torch.float16, "sinks"),
        (1, 1, 2, 8, 96, 96, 4096, torch.bfloat16, "no prefix"),
        (2, 1, 1, 64, 256, 256, 4096, torch.bfloat16, "none"),  # the most queries and the largest heads
        (2, 1, 1, 64, 256, 256, 4096, torch.float32, "none"),
        (8, 1, 2, 8, 96, 96, 4096, torch.bfloat16, "shared"),  # keys of stream 0, which has no prefix
        (4, 8, 8, 4, 128, 128, 4096, torch.bfloat16, "shared"),
    ):
        rows, prefixes = (B, P - 1) if kind == "shared" else (P * B, P)
        T = 0 if kind == "no prefix" else 48
        sizes = ((P * B, G * n, 1, D), (rows, G, K, D), (rows, G, K, V), (prefixes, G, T, D), (prefixes, G, T, V))
        tensors = [empty(*size, dtype=dtype) for size in sizes]
        kinds = {"boolean": torch.bool, "no prefix": torch.bool, "shared": torch.bool}
        mask = None if kind == "none" else empty(rows, 1, 1, K, dtype=kinds.get(kind, dtype))
        mask = empty(P * B, G * n, 1, K + 48, dtype=torch.bool) if kind == "per head" else mask
        sinks, length = (empty(G * n, dtype=dtype), empty(1, dtype=torch.int64)) if kind == "sinks" else (None, None)
        softcap = 50.0 if kind == "softcap" else None
        name = f"decode P={P} B={B} G={G} n={n} D={D} V={V} {str(dtype)[6:]} {kind}"

        def call(tensors=tensors, mask=mask, length=length, sinks=sinks, D=D, softcap=softcap):  # type: ignore[no-untyped-def]
            fused.decode(*tensors, mask, length, sinks, D**-0.5, softcap)

        yield name, call


@contextlib.contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """Launches are noted and not run; the host functions think that they are on `target`."""
    launches: list[Launch] = []

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        launches.append(Launch(kernel, grid, args, meta))

    with contextlib.ExitStack() as stack:
        for name in MODULES:
            module = importlib.import_module(f"parscale.kernels.{name}.fused")
            stack.enter_context(mock.patch.object(module, "launch", note))
            if hasattr(module, "gpu_of"):
                stack.enter_context(mock.patch.object(module, "gpu_of", return_value=TARGETS[target].gpu))
        yield launches


def source(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton's own launcher would compile for these arguments, and its options."""
    kernel, _, args, meta = launch
    options = {key: meta[key] for key in OPTIONS if key in meta} | {"enable_fp_fusion": True}
    named = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in meta.items() if k not in options}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for parameter in kernel.params:
        name, value = parameter.name, named[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def variant(launch: Launch) -> tuple[Any, ...]:
    """What tells apart the versions of a kernel that Triton compiles."""
    compiled, options = source(launch)
    return launch.kernel.__name__, str(compiled.signature), str(compiled.constants), str(compiled.attrs), str(options)


def resources(launch: Launch, target: Target) -> dict[str, Any]:
    """What a launch takes: registers of a thread, shared memory, spilled bytes of a thread, programs at a time."""
    src, options = source(launch)
    compiled = triton.compile(src, target=target.compiler, options=options)
    found = {"warps": compiled.metadata.num_warps, "shared_bytes": compiled.metadata.shared}
    if target.gpu.is_hip:
        text = compiled.asm["amdgcn"]

        def number(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))  # type: ignore[union-attr]

        # scratch memory: scalar registers that do not suffice are kept in vector registers, not there
        spills = number("private_segment_fixed_size") + 4 * number("vgpr_spill_count")
        found |= {"registers": number("vgpr_count"), "spilled_bytes": spills}
        return found | {"programs": programs(found, target)}
    text = cuobjdump(compiled.asm["cubin"], "--dump-resource-usage")
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    spills = 0
    if usage["STACK"] + usage["LOCAL"]:  # a stack frame need not be for spills: the assembler tells them apart
        arch = re.search(r"\.target (\w+)", compiled.asm["ptx"]).group(1)  # type: ignore[union-attr]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.ptx"
            path.write_text(compiled.asm["ptx"])
            command = [str(get_ptxas(target.compiler.arch).path), "-v", f"--gpu-name={arch}", "-o", f"{path}.o"]
            text = subprocess.run([*command, str(path)], check=True, capture_output=True, text=True).stderr
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
    found |= {"registers": usage["REG"], "spilled_bytes": spills}
    blocking = blocking_loads(compiled.asm["ttgir"])
    return found | {"programs": programs(found, target), "blocking": blocking} | read_sass(compiled.asm["cubin"])


def programs(found: dict[str, Any], target: Target) -> int:
    """How many programs of a kernel a multiprocessor holds at a time, by its registers, shared memory and threads."""
    if target.gpu.is_hip:  # four units of 512 registers for each of their 64 lanes, and at most 8 waves
        waves = 4 * min(8, 512 // max(8, found["registers"]))
        return min(waves // found["warps"], target.gpu.shared_memory // max(1, found["shared_bytes"]))
    warp = 32 * -(-found["registers"] // 8) * 8  # registers come in eights
    by_memory = target.gpu.shared_memory // (found["shared_bytes"] + 1024)
    return min(65536 // warp // found["warps"], by_memory, target.threads // (32 * found["warps"]), 32)


def assumed(launch: Launch, gpu: Gpu) -> dict[str, int]:
    """What the host function counts on, where it does: programs at a time, and bytes of shared memory."""
    meta, dtype = launch.meta, launch.args[1].dtype
    if launch.kernel.__name__ == "part_kernel":
        fused = importlib.import_module("parscale.kernels.decode_attention.fused")
        sizes = (meta["S"] * meta["n"], meta["D"], meta["V"])
        shared = fused.part_shared(meta, *sizes, dtype, gpu)
        return {"assumed": fused.part_programs(meta, *sizes, dtype, gpu), "assumed_bytes": shared}
    if launch.kernel.__name__ == "few_rows_kernel":
        fused = importlib.import_module("parscale.kernels.aggregator.fused")
        return {"assumed": fused.few_rows_programs(meta["P"], launch.args[0].shape[1], dtype, gpu)}
    return {}


def measure(targets: list[str], only: Sequence[str] = ("",)) -> list[dict[str, Any]]:
    """One row for each launch of each case and each target."""
    rows = []
    for target in targets:
        seen = set()
        with recorded(target) as launches:
            for case, call in cases():
                if any(part in case for part in only):
                    launches.clear()
                    call()
                    for launch in launches:
                        key = variant(launch)
                        if key in seen:
                            continue
                        seen.add(key)
                        row = {"target": target, "case": case, "kernel": launch.kernel.__name__}
                        rows.append(row | resources(launch, TARGETS[target]) | assumed(launch, TARGETS[target].gpu))
                        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(str(row.get(column, "")) for column in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--output", type=Path, help="JSON file for the results; a Markdown table goes beside it")
    args = parser.parse_args()
    rows = measure(args.targets, args.only)
    if args.output is None:
        print(table(rows))
    else:
        result = {"triton": triton.__version__, "torch": torch.__version__, "rows": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
