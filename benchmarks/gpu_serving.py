"""The part of `gpu_check.py` that needs vLLM: engines on the same backbone, one after another."""

from __future__ import annotations

import functools
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from gpu_bench import Bench, Row
from gpu_models import MODEL
from serving import PLAIN, Engine, Load, named, random_prompts, save_models

TINY_MODEL = MODEL | {  # vLLM's attention for CPUs takes few sizes of heads
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
TURNS = 2  # after one that warms up; the better one counts


def serving(bench: Bench) -> None:
    """Throughput and time to the first token of vLLM with streams, beside vLLM's own class on the backbone."""
    if find_spec("vllm") is None:
        bench.add({"what": "serving", "left_out": "vLLM is not installed"})
        return
    streams, shape = ([2], TINY_MODEL) if bench.dry else ([4, 2], MODEL)
    config = transformers.Qwen2Config(**shape, dtype=torch.bfloat16)
    with torch.device(bench.device):
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    plain: dict[Load, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder), model, streams, ["own", "shared"])
        del model  # an engine takes the rest of the GPU's memory
        if not bench.dry:
            torch.cuda.empty_cache()
        for P, kv in [(1, PLAIN), *((P, kv) for P in streams for kv in ("own", "shared"))]:
            _engine(bench, Path(folder) / (PLAIN if P == 1 else named(P, kv)), P, kv, plain)


def _engine(bench: Bench, folder: Path, P: int, kv: str, plain: dict[Load, Row]) -> None:
    """The figures of one engine."""
    new, loads = bench.size(64, 4), [Load(number, bench.size(512, 16)) for number in (1, 8, bench.size(32, 3))]
    options = ["--loads", *map(str, loads), "--new-tokens", str(new)]
    engine: Engine | None = None

    def start() -> Row:
        nonlocal engine
        begun = time.perf_counter()
        engine = Engine("vllm", folder, options)
        return {"seconds": time.perf_counter() - begun}

    bench.figure("vLLM is ready", start, P=P, kv=kv)
    if engine is None:
        return
    try:
        for load in loads:
            find = functools.partial(_answers, engine, load, new, plain)
            found = bench.figure("serving", find, P=P, kv=kv, **load._asdict(), new=new)
            if P == 1:
                plain[load] = found
    finally:
        engine.stop()


def _answers(engine: Engine, load: Load, new: int, plain: dict[Load, Row]) -> Row:
    """Of requests that come at once, and the same as ratios to the plain backbone's."""
    generator = torch.Generator().manual_seed(load.requests)
    turns = [engine.answer(random_prompts(load, 256, generator)) for _ in range(TURNS + 1)][1:]
    found = {
        "tokens_per_second": load.requests * new / min(turn["seconds"] for turn in turns),
        "first_token_seconds": min(turn["first"] for turn in turns),
        "further_token_seconds": min(turn["further"] for turn in turns),
    }
    return found | {f"{name}_to_P1": found[name] / other for name, other in plain.get(load, {}).items()}
