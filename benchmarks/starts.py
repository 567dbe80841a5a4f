"""The starts that `inits.py` compares: where their texts come from, and how the prefixes are made of them.

P streams, T prefix tokens, G key heads, D head size, B rows, S tokens, H hidden size, N candidate texts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from parscale import wrap

P, T = 4, 48
CANDIDATES, SCORED_BLOCKS = 32, 8

# -- texts that streams start from, (P, T) or (N, T)


@dataclass
class Lab:
    """A backbone, its tokenizer, and blocks of training text."""

    backbone: Any
    tokenizer: Any
    blocks: torch.Tensor  # (n, SEQUENCE_LENGTH)

    def wrapped(self, seed: int, init: str = "context", texts: torch.Tensor | None = None) -> Any:
        """A copy of the backbone with streams."""
        count = P if texts is None else len(texts)
        return wrap(copy.deepcopy(self.backbone), count, prefix_length=T, init=init, seed=seed, calibration=texts)


def pieces(lab: Lab, seed: int, count: int = P) -> torch.Tensor:
    """Different pieces of training text."""
    rows = torch.randperm(len(lab.blocks), generator=torch.Generator().manual_seed(seed))[:count]
    return lab.blocks[rows, :T]


def endings(lab: Lab, seed: int) -> torch.Tensor:
    """The last T - 1 tokens of different files, each with the end-of-text token, after which a file may begin."""
    stream = lab.blocks.flatten()
    ends = (stream == lab.tokenizer.eos_token_id).nonzero().flatten()
    ends = ends[ends >= T]
    chosen = ends[torch.randperm(len(ends), generator=torch.Generator().manual_seed(seed))[:P]]
    return torch.stack([stream[end - T + 1 : end + 1] for end in chosen])


def continuations(lab: Lab, seed: int, natural: bool = True) -> torch.Tensor:
    """What the backbone itself writes.

    Args:
        natural: after an end-of-text token at temperature 0.8, without the first T tokens; otherwise as
            `init="context"` does it, after a different random token for each text at temperature 1.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        start = torch.randperm(len(lab.tokenizer))[:P, None]
        if natural:
            start = torch.full((P, 1), lab.tokenizer.eos_token_id)
        written = lab.backbone.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=0.8 if natural else 1.0,
            top_k=0,
            max_new_tokens=2 * T if natural else T,
            eos_token_id=None,
            pad_token_id=0,
        )
    return written[:, -T:]


def ended(lab: Lab, texts: torch.Tensor) -> torch.Tensor:
    """The texts with the end-of-text token in place of their last."""
    texts = texts.clone()
    texts[:, -1] = lab.tokenizer.eos_token_id
    return texts


@torch.no_grad()
def selected(lab: Lab, seed: int, candidates: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """P of N candidates, one after another: each time the one with which the equally weighed streams' loss is lowest.

    Args:
        candidates: `(N, T)`.
        scored: blocks `(B, S)` on which the loss is taken.
    """
    model = lab.wrapped(seed, texts=candidates).eval()
    with streams_of(model) as captured:
        for block in scored:
            model(input_ids=block[None], use_cache=False)
    hidden = torch.stack(captured, dim=1)[:, :, :-1]  # (N, B, S - 1, H)
    head, targets = model.get_output_embeddings(), scored[:, 1:].flatten()
    chosen: list[int] = []
    for _ in range(P):
        total = sum(hidden[index] for index in chosen)
        losses = [
            float("inf")
            if index in chosen
            else cross_entropy(head((total + hidden[index]) / (len(chosen) + 1)).flatten(0, 1), targets).item()
            for index in range(len(candidates))
        ]
        chosen.append(int(np.argmin(losses)))
    return candidates[chosen]


@contextmanager
def streams_of(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collects the streams' final hidden states `(P*B, S, H)` of each forward pass, before they are mixed."""
    captured: list[torch.Tensor] = []
    with model.get_decoder().register_forward_hook(lambda m, args, output: captured.append(output[0]), prepend=True):
        yield captured


# -- starts


def prefixes(model: Any, ends: tuple[str, ...] = ("prefix_k", "prefix_v")) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith(ends)}


def drawn(lab: Lab, seed: int, std: float, orthogonal: bool = False) -> Any:
    """Normal draws; on request each head's P streams are orthogonal to each other, and as long as before."""
    model = lab.wrapped(seed, "random")
    for prefix in prefixes(model).values():
        prefix.data *= std / lab.backbone.config.initializer_range
        if orthogonal:
            flat = prefix.data.transpose(0, 1).flatten(2)  # (G, P, T*D)
            bases = torch.linalg.qr(flat.transpose(1, 2)).Q.transpose(1, 2) * std * flat.shape[2] ** 0.5
            prefix.data = bases.unflatten(2, prefix.shape[2:]).transpose(0, 1).contiguous()
    return model


def matched(lab: Lab, seed: int) -> Any:
    """Normal draws with the mean and deviation that each head's keys and values have on training text."""
    model, read = lab.wrapped(seed, "random"), lab.wrapped(seed, texts=pieces(lab, seed, CANDIDATES))
    std = lab.backbone.config.initializer_range
    for prefix, real in zip(prefixes(model).values(), prefixes(read).values(), strict=True):
        mean, deviation = real.data.mean((0, 2), keepdim=True), real.data.std((0, 2), keepdim=True)  # (1, G, 1, D)
        prefix.data = mean + prefix.data / std * deviation
    return model


def damped(lab: Lab, seed: int, factor: float) -> Any:
    """Training text with smaller values."""
    model = lab.wrapped(seed, texts=pieces(lab, seed))
    for value in prefixes(model, ("prefix_v",)).values():
        value.data *= factor
    return model


def quiet(lab: Lab, seed: int, nats: float) -> Any:
    """Training text whose attention logits are lower by so many nats on average, by a shift of the keys.

    The shift is along the direction in which the backbone's queries vary least for the logits that it takes off.
    """
    queries: dict[int, torch.Tensor] = {}
    scalings: dict[int, float] = {}

    def attention(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        queries[module.layer_idx], scalings[module.layer_idx] = query.detach(), kwargs["scaling"]  # (B, heads, S, D)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *args, **kwargs)

    AttentionInterface.register("queries", attention)
    AttentionMaskInterface.register("queries", sdpa_mask)
    plain = copy.deepcopy(lab.backbone)
    plain.set_attn_implementation("queries")
    with torch.no_grad():
        plain(input_ids=lab.blocks[-SCORED_BLOCKS:], use_cache=False)
    model = lab.wrapped(seed, texts=pieces(lab, seed))
    for layer, key in enumerate(prefixes(model, ("prefix_k",)).values()):
        for group, of_group in enumerate(queries[layer].chunk(key.shape[1], dim=1)):
            rows = of_group.reshape(-1, key.shape[3]).double()
            mean, covariance = rows.mean(0), torch.cov(rows.T) + 1e-3 * torch.eye(key.shape[3])
            direction = torch.linalg.solve(covariance, mean)
            key.data[:, group] -= (nats / scalings[layer] * direction / (mean @ direction)).float()
    return model


def mixing(lab: Lab, seed: int) -> Any:
    """Training text, and an aggregator whose last layer is drawn too, so that weights differ from the start."""
    model = lab.wrapped(seed, texts=pieces(lab, seed))
    generator = torch.Generator().manual_seed(seed)
    model.get_decoder().aggregate_layer[2].weight.data.normal_(
        0.0, lab.backbone.config.initializer_range, generator=generator
    )
    return model


def selected_pieces(lab: Lab, seed: int) -> Any:
    candidates = pieces(lab, seed, CANDIDATES + SCORED_BLOCKS)[:CANDIDATES]
    rows = torch.randperm(len(lab.blocks), generator=torch.Generator().manual_seed(seed))
    scored = lab.blocks[rows[CANDIDATES : CANDIDATES + SCORED_BLOCKS]]
    return lab.wrapped(seed, texts=selected(lab, seed, candidates, scored))


STARTS: dict[str, Callable[[Lab, int], Any]] = {
    "random": lambda lab, seed: drawn(lab, seed, 0.02),
    "random 0.002": lambda lab, seed: drawn(lab, seed, 0.002),
    "random 1.0": lambda lab, seed: drawn(lab, seed, 1.0),
    "orthogonal": lambda lab, seed: drawn(lab, seed, 0.02, orthogonal=True),
    "matched": matched,
    "sampled": lambda lab, seed: lab.wrapped(seed),
    "written": lambda lab, seed: lab.wrapped(seed, texts=continuations(lab, seed)),
    "sampled, ended": lambda lab, seed: lab.wrapped(seed, texts=ended(lab, continuations(lab, seed, natural=False))),
    "written, ended": lambda lab, seed: lab.wrapped(seed, texts=ended(lab, continuations(lab, seed))),
    "text": lambda lab, seed: lab.wrapped(seed, texts=pieces(lab, seed)),
    "text, cut and ended": lambda lab, seed: lab.wrapped(seed, texts=ended(lab, pieces(lab, seed))),
    "text, ended": lambda lab, seed: lab.wrapped(seed, texts=endings(lab, seed)),
    "text, selected": selected_pieces,
    "text, damped": lambda lab, seed: damped(lab, seed, 0.5),
    "text, quiet": lambda lab, seed: quiet(lab, seed, 2.0),
    "text, mixing": mixing,
}
