"""Other configurations of each Triton kernel beside the one that ships, on this GPU: what there is to gain.

    python benchmarks/tune.py --output benchmarks/results/tune.json
    python benchmarks/tune.py --only "decode attention"
    TRITON_INTERPRET=1 python benchmarks/tune.py --dry-run   # two candidates at tiny sizes, for a test

Every candidate's results are compared with torch's before its time counts. The configurations that ship stand in the
functions named `..._config` of `kernels/*/fused.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_bench import Bench, aggregator_tensors, decode_tensors, randn, versions

from parscale.kernels import aggregate, aggregator, decode_attention

Options = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Subject:
    """One kernel at one size.

    Attributes:
        name: for the table.
        module: of the host functions, under `parscale.kernels`.
        config: the function there that chooses the configuration.
        choices: values for each of its entries; `MAX_SPLITS` is the module's number. Every combination is tried.
        call: the operation, given `impl`.
        fits: which combinations make sense.
    """

    name: str
    module: str
    config: str
    choices: dict[str, list[int]]
    call: Callable[[str], Any]
    fits: Callable[[Options], bool] = lambda options: True

    def candidates(self) -> Iterator[Options]:
        for values in itertools.product(*self.choices.values()):
            options = dict(zip(self.choices, values, strict=True))
            if self.fits(options):
                yield options

    @contextlib.contextmanager
    def using(self, options: Options) -> Iterator[Options]:
        """The host functions choose `options`, and beside them what they ship with; yields what was chosen."""
        module = importlib.import_module(f"parscale.kernels.{self.module}.fused")
        config, chosen = getattr(module, self.config), dict(options)
        replaced: Options = {}
        if "MAX_SPLITS" in self.choices:
            replaced["MAX_SPLITS"] = chosen.setdefault("MAX_SPLITS", module.MAX_SPLITS)

        def choose(*args: Any) -> Options:
            found = config(*args) | {name: value for name, value in options.items() if name != "MAX_SPLITS"}
            chosen.update(found)
            return found

        with mock.patch.multiple(module, **replaced, **{self.config: choose}):
            yield chosen


def subjects(bench: Bench) -> Iterator[Subject]:
    P, H = 8, bench.size(1536, 48)
    warps = [4, 8]
    N = bench.size(4096, 34)
    many = aggregator_tensors(bench, P, N, H, torch.bfloat16)
    x, logits = many[0], randn(bench, N, P)

    def mix(impl: Any) -> torch.Tensor:
        return aggregate(x, logits, 0.1, impl=impl)

    def mix_back(impl: Any) -> tuple[torch.Tensor, ...]:
        own = [t.detach().requires_grad_() for t in (x, logits)]
        return torch.autograd.grad(aggregate(*own, 0.1, impl=impl), own, x[0])

    tiles = {"BN": [1, 2, 4, 8], "BH": [256, 512, 1024, 2048], "UNROLL": [4, 8], "num_warps": warps}
    yield Subject(
        f"aggregate, N={N}", "aggregate", "forward_config", tiles, mix, lambda o: 1024 <= o["BN"] * o["BH"] <= 4096
    )
    tiles = {"BH": [128, 256, 512, 1024], "num_warps": [2, 4, 8]}
    yield Subject(f"aggregate, both ways, N={N}", "aggregate", "backward_config", tiles, mix_back)
    for rows in (bench.size(64, 33), N):
        tensors = [many[0][:, :rows], *many[1:]]

        def whole(impl: Any, tensors: Any = tensors) -> torch.Tensor:
            return aggregator(*tensors, 0.1, impl=impl)

        tiles = {"BH": [128, 256, 512, 1024], "num_warps": warps}
        yield Subject(f"aggregator's rows, N={rows}", "aggregator", "join_config", tiles, whole)
        yield Subject(f"aggregator's end, N={rows}", "aggregator", "finish_config", tiles, whole)
    for rows in (1, 8):
        few = [many[0][:, :rows], *many[1:]]

        def step(impl: Any, few: Any = few) -> torch.Tensor:
            return aggregator(*few, 0.1, impl=impl)

        tiles = {"BJ": [16, 32], "BH": [16, 32, 64], "num_warps": warps, "num_stages": [3, 5], "MAX_SPLITS": [4, 16]}
        yield Subject(f"aggregator, N={rows}", "aggregator", "few_rows_config", tiles, step)
        tiles = {"BH": [256, 512, 1024], "num_warps": warps}
        yield Subject(f"aggregator's end, N={rows}", "aggregator", "finish_config", tiles, step)
    D, K = bench.size(96, 16), bench.size(4096, 20)
    for B in (1, bench.size(8, 2)):
        states = decode_tensors(bench, P, B, K, D)
        mask = torch.ones(P * B, 1, 1, 48 + K, dtype=torch.bool, device=bench.device)

        def attend(impl: Any, states: Any = states, mask: Any = mask) -> torch.Tensor:
            return decode_attention(*states, mask, impl=impl)

        tiles = {"BT": [32, 64, 128], "num_warps": [2, 4, 8], "num_stages": [2, 3, 4], "MAX_SPLITS": [8, 16, 32]}
        yield Subject(f"decode attention, B={B}", "decode_attention", "part_config", tiles, attend)


def products(bench: Bench) -> list[dict[str, Any]]:
    """The aggregator's large product by libraries.

    cuBLAS, which runs, has the streams rearranged for it beforehand, which is not timed. cuDNN takes them as they lie,
    as an image of P x N points with H channels, under a filter of P x 1 points.
    """
    P, H, found = 8, bench.size(1536, 48), []
    for N in (bench.size(4096, 20), bench.size(16384, 40)):
        x, weight = randn(bench, P, N, H), randn(bench, H, P, H, scale=(H * P) ** -0.5)
        joined, flat = x.transpose(0, 1).reshape(N, P * H), weight.flatten(1)
        image, kernel = x[None].permute(0, 3, 1, 2), weight.permute(0, 2, 1)[..., None]  # (1, H, P, N), (H, H, P, 1)
        ways = {
            "cublas": lambda joined=joined, flat=flat: joined @ flat.T,
            "cudnn": lambda image=image, kernel=kernel: torch.nn.functional.conv2d(image, kernel),
        }
        for name, call in ways.items():
            wrong = error(call().reshape(H, N).T if name == "cudnn" else call(), joined.float() @ flat.float().T)
            row = {"by": name, "N": N, "seconds": bench.seconds(bench.graphed(call)), "error": wrong}
            print("product", json.dumps(row), file=sys.stderr, flush=True)
            found.append(row)
    return found


def error(found: Any, expected: Any) -> float:
    """The largest relative error of several tensors, in the norm."""
    pairs = zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (found, expected)), strict=True)
    return max(((a - b).double().norm() / b.double().norm()).item() for a, b in pairs)


def tune(bench: Bench, subject: Subject) -> dict[str, Any]:
    """Times what ships, the first row, and every candidate."""
    expected, rows = subject.call("reference"), []
    candidates = list(subject.candidates())

    def call() -> Any:
        return subject.call("fused")

    for options in ({}, *(candidates[:: len(candidates) - 1] if bench.dry else candidates)):
        with subject.using(options) as row:
            try:
                wrong = error(call(), expected)
                seconds = bench.seconds(bench.graphed(call))
                found = {"seconds": seconds, "error": wrong, "right": wrong < 0.02}
            except Exception as failure:  # of resources: the device says which
                found = {"failed": f"{type(failure).__name__}: {failure}"[:200], "right": False}
        rows.append({"config": row} | found)
    best = sorted((row for row in rows if row["right"]), key=lambda row: row["seconds"])
    gain = rows[0]["seconds"] / best[0]["seconds"] if rows[0]["right"] else None
    print(f"{subject.name}: {len(rows)} tried; what ships takes {gain} times as long as the best", file=sys.stderr)
    for row in [rows[0], *best[:3]]:
        print("   ", json.dumps(row), file=sys.stderr, flush=True)
    return {"subject": subject.name, "gain": gain, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes in Triton's interpreter")
    parser.add_argument("--only", default="", help="subjects whose name contains this")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("tune needs a CUDA or ROCm device, and torch sees none; --dry-run needs none.")
    torch.manual_seed(0)
    bench, start, found = Bench(args.dry_run), time.perf_counter(), []
    libraries = products(bench)
    for subject in subjects(bench):
        if args.only in subject.name:
            found.append(tune(bench, subject))
            figures = {"seconds": time.perf_counter() - start, "products": libraries, "subjects": found}
            result = versions(args.dry_run) | figures
            if args.output is not None:  # after each, so that a run that is stopped leaves what it found
                args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
