"""The parts of `gpu_check.py` that run a whole model of the 1.8B shape: steps of decoding and of training."""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import torch
import transformers
from gpu_bench import Bench, Call, Row
from released import released_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from parscale import unwrap, wrap
from parscale.kernels import decode_attention, visible_lengths

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


def plain_model(bench: Bench) -> Any:
    """The backbone, with random weights."""
    torch.manual_seed(0)
    shape = TINY_MODEL if bench.dry else MODEL
    config = transformers.Qwen2Config(**shape, attn_implementation="sdpa", dtype=torch.bfloat16)
    with torch.device(bench.device):
        return transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)


def with_streams(model: Any, P: int, kv: str = "own") -> Any:
    """The same backbone with P streams; plain again if P is 1."""
    if hasattr(model, "parscale"):
        unwrap(model)
    return wrap(model, P, init="random", seed=0, kv=kv) if P > 1 else model


class OwnDecode:
    """The plain backbone's attention by our kernel, which splits a sequence; torch's with a mask does not."""

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None
        self.length: torch.Tensor | None = None

    def __call__(self, module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        if query.shape[2] > 1:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        if attention_mask is not self.mask:  # once for all layers, as with streams
            self.mask = attention_mask
            self.length = None if attention_mask is None else visible_lengths(attention_mask)
        nothing = key.new_empty(1, key.shape[1], 0, key.shape[3])
        options: Any = {"length": self.length, "scaling": kwargs.get("scaling")}
        return decode_attention(query, key, value, nothing, nothing, attention_mask, **options).transpose(1, 2), None


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
    transformers.AttentionInterface.register("own_decode", OwnDecode())
    transformers.AttentionMaskInterface.register("own_decode", sdpa_mask)
    model = plain_model(bench).eval()
    plain: dict[int, Row] = {}
    for attention in ("sdpa", "own_decode"):
        model.set_attn_implementation(attention)
        for length, found in _steps(bench, model, {}, P=1, kv="own", attention=attention).items():
            plain.setdefault(length, {})[f"to_P1_by_{attention}"] = found
    model.set_attn_implementation("sdpa")
    for P in (8, 4, 2):
        for kv in ("own", "shared"):
            _steps(bench, with_streams(model, P, kv), plain, P=P, kv=kv, attention="sdpa")


def _steps(bench: Bench, model: Any, plain: dict[int, Row], **sizes: Any) -> dict[int, float]:
    """Seconds by length, of those that were measured."""
    floor, times = bench.floor(2 * sum(p.numel() for p in model.parameters())), {}
    for length in (bench.size(512, 8), bench.size(4096, 16), bench.size(16384, 24)):

        def step(length: int = length) -> Row:
            seconds = bench.seconds(captured_step(bench, model, length, is_compiled=False))
            ratios = {name: seconds / other for name, other in plain.get(length, {}).items()}
            return {"seconds": seconds, "weights_floor": floor, **ratios}

        found = bench.figure("step", step, **sizes, length=length)
        if found:
            times[length] = found["seconds"]
    return times


@torch.no_grad()
def from_python(bench: Bench) -> None:
    """A step as Python runs it, with a cache that grows: P = 1, P = 8, and the released code with P = 8."""
    length = bench.size(512, 8)
    model = plain_model(bench).eval()
    for P in (1, 8):
        bench.figure("step from Python", functools.partial(_python_step, bench, with_streams(model, P), length), P=P)
    if bench.released is not None:
        with torch.device(bench.device):
            shape = TINY_MODEL if bench.dry else MODEL
            released = released_model(bench.released, shape, P=8).to(torch.bfloat16).eval()
        bench.figure("step of the released code", functools.partial(_python_step, bench, released, length), P=8)


def _python_step(bench: Bench, model: Any, length: int) -> Row:
    ids = torch.randint(0, 64, (1, length), device=bench.device)
    cache = model(ids, use_cache=True).past_key_values
    return {"seconds": bench.seconds(lambda: model(ids[:, :1], past_key_values=cache, use_cache=True))}


def _beside_plain(model: Any, plain: dict[str, float], what: str, seconds: float) -> Row:
    """A figure and, if that of the plain model was measured, its ratio to it; `plain` has those of the plain model."""
    if not hasattr(model, "parscale"):
        plain[what] = seconds
    return {"seconds": seconds} | ({"to_P1": seconds / plain[what]} if what in plain else {})


@torch.no_grad()
def compiled_decoding(bench: Bench) -> None:
    """The compiled step and the whole of `generate`, P = 1 and 8."""
    length, tokens = bench.size(512, 8), bench.size(64, 4)
    ids = torch.randint(0, 64, (1, length), device=bench.device)
    model, plain = plain_model(bench).eval(), dict[str, float]()

    def step() -> Row:
        return _beside_plain(model, plain, "step", bench.seconds(captured_step(bench, model, length, is_compiled=True)))

    def generate(new: int) -> float:
        options = {} if bench.dry else {"cache_implementation": "static"}
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, **options)
        if not bench.dry:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def token() -> Row:
        generate(tokens)  # compiles
        long, short = (statistics.median(generate(n) for _ in range(3)) for n in (tokens, 2))
        return _beside_plain(model, plain, "token", (long - short) / (tokens - 2))

    for P in (1, 8):
        model = with_streams(model, P)
        torch._dynamo.reset()
        bench.figure("compiled step", step, P=P, length=length)
        bench.figure("token of generate", token, P=P, length=length)


def training(bench: Bench) -> None:
    """A training step beside the plain backbone's at batch P*B with B rows of loss, in bfloat16, captured."""
    P, S = 4, bench.size(1024, 8)
    ids = torch.randint(0, 64, (1, S), device=bench.device)
    model, plain = plain_model(bench).train(), dict[str, float]()

    def step() -> Any:
        if hasattr(model, "parscale"):
            logits = model(ids).logits
        else:
            logits = model.lm_head(model.model(ids.repeat(P, 1))[0][:1])
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        return torch.autograd.grad(loss, list(model.parameters()))

    def time_step() -> Row:
        seconds = bench.seconds(bench.graphed(step), repeats=9)
        return _beside_plain(model, plain, "step", seconds)

    bench.figure("training", time_step, P=1, rows=P, S=S)
    model = with_streams(model, P)
    bench.figure("training", time_step, P=P, rows=P, S=S)
