"""The models of the study from scratch: what each arm is, built from a seed.

B rows, S tokens, V vocabulary, H hidden size, P streams, T prefix tokens, G key heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
from variants import add_vectors, add_window, apply_variant

VOCABULARY = 256
BASE_WIDTH = 48  # at which learning rates are tuned; beyond, they fall as the inverse width


@dataclass(frozen=True)
class Run:
    """One model to train."""

    hidden: int
    layers: int
    streams: int
    tokens: int
    seed: int
    learning_rate: float
    """At a width of 48."""
    arm: str = "streams"
    """`"streams"` (with P = 1: the dense model), `"prefix"`, or `"twin"`: dense, with the parameters of P streams."""
    prefix_length: int = 8
    variant: str = ""
    """Of the streams, or of those whose parameters a twin has; see `variants.py`. With one stream or one prefix:
    `"embedding"` or `"shared-window=W"`, what one stream of that variant has."""
    batch_size: int = 8
    """Sequences in a step."""

    @property
    def name(self) -> str:
        """Of its row and its folder; it tells every field."""
        parts = [self.arm, f"h{self.hidden}", f"l{self.layers}", f"p{self.streams}", f"t{self.prefix_length}"]
        parts += [f"n{self.tokens}", f"r{self.learning_rate:g}", f"s{self.seed}"]
        parts += [f"b{self.batch_size}"] if self.batch_size != 8 else []
        return "-".join(parts + ([self.variant.replace("=", "")] if self.variant else []))


class Plain(nn.Module):
    """A Hugging Face model without streams as a function of token ids; with a vector added to its input, if wanted."""

    def __init__(self, model: Any, vector: bool = False) -> None:
        super().__init__()
        self.model = model
        if vector:
            self.of_stream = add_vectors(model, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`(B, S)` to logits `(B, S, V)`."""
        return self.model(input_ids=ids, use_cache=False).logits


class OnePrefix(Plain):
    """A model with one trained prefix: keys and values that every token attends to, without positions.

    What one stream of `parscale.wrap` has, at the cost of the plain model: the prefix lies in the cache, real tokens
    keep positions 0, 1, 2, .... With a vector added to the input, if wanted.
    """

    def __init__(self, model: Any, prefix_length: int, seed: int, vector: bool = False) -> None:
        super().__init__(model, vector)
        config = model.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (2, 1, config.num_key_value_heads, prefix_length, head)
        generator = torch.Generator().manual_seed(seed)
        self.prefixes = nn.ParameterList(
            torch.randn(shape, generator=generator) * config.initializer_range for _ in range(config.num_hidden_layers)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`(B, S)` to logits `(B, S, V)`."""
        cache = DynamicCache()
        for layer, prefix in enumerate(self.prefixes):
            key, value = prefix.expand(-1, len(ids), -1, -1, -1)  # each (B, G, T, D)
            cache.update(key, value, layer)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return self.model(input_ids=ids, past_key_values=cache, position_ids=positions, use_cache=True).logits


def build(run: Any, vocabulary: int = VOCABULARY) -> nn.Module:
    """The model of a run, a `Run` or a task's, with the weights it starts from."""
    intermediate = 8 * round(run.hidden / 3)
    if run.arm == "twin":
        intermediate += round(_added_parameters(run) / (3 * run.hidden * run.layers))
    torch.manual_seed(run.seed)
    model: Any = backbone(run.hidden, run.layers, intermediate, vocabulary)
    kind, _, value = run.variant.partition("=")
    if kind == "shared-window" and run.streams == 1:
        add_window(model, int(value))
    if run.arm == "prefix":
        return OnePrefix(model, run.prefix_length, run.seed, vector=run.variant == "embedding")
    if run.arm == "twin" or run.streams == 1:
        return Plain(model, vector=run.arm != "twin" and run.variant == "embedding")
    return apply_variant(run.variant, model, run.streams, run.prefix_length, run.seed)


def backbone(hidden: int, layers: int, intermediate: int, vocabulary: int = VOCABULARY) -> Any:
    """A Qwen2 with random weights; heads are 24 or 32 wide and share one key head."""
    head = 32 if hidden % 32 == 0 else hidden // 2  # 24 at a width of 48, 40 at 80
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // head,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=hidden**-0.5,
        bos_token_id=None,
        eos_token_id=0,
        attn_implementation="sdpa" if torch.cuda.is_available() else "eager",  # the faster one at these sizes
    )
    return Qwen2ForCausalLM(config)


def _added_parameters(run: Any) -> int:
    """What P streams add to the dense model."""
    torch.manual_seed(run.seed)
    model: Any = backbone(run.hidden, run.layers, 8 * round(run.hidden / 3))
    before = model.num_parameters()
    wrapped = apply_variant(run.variant, model, run.streams, run.prefix_length, run.seed)
    return sum(parameter.numel() for parameter in wrapped.parameters()) - int(before)
