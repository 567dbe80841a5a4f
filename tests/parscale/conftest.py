"""The zoo: tiny random models of many families, and a reference that runs none of parscale's code.

Tests ask for `family`, one `Family` after another; `@pytest.mark.parametrize("family", ["llama"],
indirect=True)` narrows it down. `case` also goes through the attention implementations that the family supports.
"""

import dataclasses
import inspect
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from small_models import SMALL
from torch import nn
from transformers import DynamicCache

import parscale

P, T, B, S, VOCABULARY = 3, 4, 2, 9, 96
WINDOW = 5  # shorter than the input, so that a prefix that the window hid would show

COMMON = SMALL | {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4}


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: of its classes, as in `LlamaConfig`.
        options: of its configuration, beside the common ones.
        common: the common options.
        attention: the implementations that it supports on a CPU.
        window: its sliding window, in the layers that have one.
        learned_positions: an embedding table of positions, in place of RoPE.
        attention_layers: indices of the layers with keys and values; `None`: all.
        latent_cache: the cache holds something else than keys and values.
        packs: it keeps documents in one row apart by positions that restart.
        balances: the name of the module with `load_balancing_loss_func`.
        suffix: of the model's class.
        key_bias: what biases of keys are multiplied by, which are of size 0.3.
    """

    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    common: dict[str, Any] = dataclasses.field(default_factory=lambda: COMMON)
    attention: tuple[str, ...] = ("eager", "sdpa")
    window: int | None = None
    learned_positions: bool = False
    attention_layers: tuple[int, ...] | None = None
    latent_cache: bool = False
    packs: bool = True
    balances: str | None = None
    suffix: str = "ForCausalLM"
    key_bias: float = 1.0

    def config(self, attention: str = "eager", **changes: Any) -> Any:
        config = getattr(transformers, f"{self.name}Config", None)
        if config is None:
            pytest.skip(f"transformers {transformers.__version__} has no {self.name}")
        return config(**self.common | self.options | changes, attn_implementation=attention)

    def build(self, attention: str = "eager", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        """A model in eval mode with random weights, large enough that every part of it matters."""
        config = self.config(attention, **changes)
        name = {"GPT2": "GPT2LMHeadModel"}.get(self.name, f"{self.name.removesuffix('Text')}{self.suffix}")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = getattr(transformers, name)(config)
            randomize(model)
        for name, parameter in model.named_parameters():
            if name.endswith(".k_proj.bias"):
                parameter.data.mul_(self.key_bias)
        if dtype == torch.float64:  # the fused experts know no such numbers
            model.config._experts_implementation = "eager"
        return model.to(dtype).eval()

    @property
    def all_experts(self) -> dict[str, Any]:
        """Options under which every expert is chosen for every token."""
        if "num_experts_per_tok" not in self.options:
            return {}
        return {"num_experts_per_tok": 4} | ({"topk_group": 2} if "topk_group" in self.options else {})

    def window_of(self, config: Any, layer: int) -> int | None:
        """The sliding window of a layer."""
        kinds = getattr(config, "layer_types", None)
        if self.window is None or (kinds is not None and kinds[layer] != "sliding_attention"):
            return None
        return self.window


GPT_NEOX = COMMON | {"num_key_value_heads": 4}
QWEN_MOE = {
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "head_dim": 8,
}
WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama": Family("Llama", {"attention_bias": True}),
    "mistral": Family("Mistral", {"sliding_window": WINDOW, "head_dim": 8}, window=WINDOW),
    "qwen2": Family("Qwen2"),
    "qwen3": Family(
        "Qwen3", {"head_dim": 16, "use_sliding_window": True, "max_window_layers": 0} | WINDOWED, window=WINDOW
    ),
    "qwen3_moe": Family("Qwen3Moe", QWEN_MOE, balances="qwen3_moe"),
    "gemma2": Family(
        "Gemma2",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
        | WINDOWED,
        attention=("eager",),
        window=WINDOW,
    ),
    "gemma3": Family(
        "Gemma3Text", {"head_dim": 8, "query_pre_attn_scalar": 8} | WINDOWED, window=WINDOW, suffix="ForCausalLM"
    ),
    "phi3": Family("Phi3"),
    "olmo2": Family("Olmo2"),
    "gpt_neox": Family("GPTNeoX", {"rotary_pct": 0.5}, common=GPT_NEOX),
    "gpt2": Family("GPT2", {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}, learned_positions=True),
    "opt": Family(
        "OPT", {"ffn_dim": 48, "word_embed_proj_dim": 24, "dropout": 0.0}, learned_positions=True, packs=False
    ),
    "mixtral": Family("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}, balances="mixtral"),
    "deepseek_v3": Family(
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 24,
            "n_shared_experts": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 12,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 10,
            "num_mtp_layers": 0,
        },
        latent_cache=True,
    ),
    "gpt_oss": Family(
        "GptOss",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": ROPE} | WINDOWED,
        attention=("eager",),
        window=WINDOW,
        packs=False,
        balances="gpt_oss",
    ),
    "qwen3_next": Family(
        "Qwen3Next",
        QWEN_MOE
        | {
            "num_hidden_layers": 4,
            "shared_expert_intermediate_size": 24,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        attention_layers=(3,),
        packs=False,
        balances="qwen3_next",
    ),
}
# As published weights of Qwen2 have them: biases of size 20, beside keys of size 1. Scores are then of size 100 at
# most, and each of their 8 products and sums may be off by 2**-24 of that, and so may the weights, relatively; twice
# that for two layers. Measured: 2e-5.
BIASED, BIASED_TOLERANCE = dataclasses.replace(FAMILIES["qwen2"], key_bias=60.0), 2 * 8 * 100 * 2**-24
# In `make test` grids go through these: each does something that the others do not. The rest is for the night.
DAILY = ("llama", "gemma3", "gpt2", "deepseek_v3", "gpt_oss", "qwen3_next")


def grid(cases: dict[str, bool]) -> list[Any]:
    """Parameters of a fixture or test by their names, and whether `make test` has them."""
    return [pytest.param(name, id=name, marks=() if daily else pytest.mark.nightly) for name, daily in cases.items()]


CASES = {
    f"{name}-{attention}": name in DAILY and attention in (family.attention[-1], "eager" if name == "llama" else None)
    for name, family in FAMILIES.items()
    for attention in family.attention
}


def randomize(model: nn.Module) -> None:
    """Draws every weight: matrices keep the scale of what passes through, vectors are moved from where they were."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim < 2:
                parameter.add_(noise, alpha=0.3)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)


def fill_streams(model: Any, seed: int = 1, name: str = "default") -> None:
    """Streams that differ and that matter: prefixes of size 1, aggregation weights far from equal."""
    generator = torch.Generator().manual_seed(seed)
    suffix = "" if name == "default" else f"@{name}"
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if own.endswith((f".prefix_k{suffix}", f".prefix_v{suffix}")):
                scale = 1.0
            elif f"aggregate_layer{suffix}." in own:
                scale = 0.3 if parameter.ndim == 1 else 3.0 * parameter.shape[-1] ** -0.5
            else:
                continue
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def gemma3n() -> Any:
    """A model whose layers have inputs of their own for each token, and some of which borrow other layers' keys."""
    config = transformers.Gemma3nTextConfig(
        **COMMON | {"num_hidden_layers": 4},
        head_dim=8,
        num_kv_shared_layers=2,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.Gemma3nForCausalLM(config).eval()


def share(model: Any, num_streams: int = P, **changes: Any) -> Any:
    """The model with random streams that share keys and values."""
    options = {"prefix_length": T, "init": "random", "kv": "shared"} | changes
    parscale.wrap(model, num_streams, **options)
    fill_streams(model)
    return model


@dataclasses.dataclass(frozen=True)
class Case:
    """A family under one attention implementation."""

    family: Family
    attention: str = "eager"

    def plain(self, **changes: Any) -> Any:
        """A model that was never wrapped; the same weights at every call. Arguments as `Family.build`."""
        return self.family.build(self.attention, **changes)

    def wrapped(self, num_streams: int = P, prefix_length: int = T, smoothing: float = 0.1, **changes: Any) -> Any:
        """The same model with random streams."""
        model = self.plain(**changes)
        parscale.wrap(model, num_streams, prefix_length=prefix_length, smoothing=smoothing, init="random")
        fill_streams(model)
        return model

    def reference(self, model: Any, **changes: Any) -> "Reference":
        """The independent computation of what `model`, made by `wrapped`, should give."""
        return Reference(self.family, self.plain(**changes), model)


@pytest.fixture(scope="session")
def zoo() -> ModuleType:
    """This module, for its sizes and functions."""
    return sys.modules[__name__]


@pytest.fixture
def at_once() -> Callable[..., list[Any]]:
    """Runs each function that it is given in a thread of its own; their results, or the first error."""

    def run(*functions: Callable[[], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(functions)) as threads:
            return [result.result() for result in [threads.submit(function) for function in functions]]

    return run


@pytest.fixture
def tiny(zoo: ModuleType) -> Any:
    """Makes a small Llama, the same at every call."""
    return zoo.Case(zoo.FAMILIES["llama"], "sdpa").plain


@pytest.fixture
def wrapped(zoo: ModuleType) -> Any:
    """A small Llama with four streams and two further sets, the last of one stream."""
    model = zoo.Case(zoo.FAMILIES["llama"], "sdpa").wrapped(4)
    model.add_streams("code", 2, prefix_length=3, init="random", smoothing=0.2)
    zoo.fill_streams(model, seed=5, name="code")
    model.add_streams("one", 1)
    return model


@pytest.fixture(params=grid({name: name in DAILY for name in FAMILIES}))
def family(request: pytest.FixtureRequest) -> Case:
    """Each family, under `sdpa` where it supports that."""
    return Case(FAMILIES[request.param], FAMILIES[request.param].attention[-1])


@pytest.fixture(params=grid(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Each family under each attention implementation that it supports."""
    name, attention = request.param.rsplit("-", 1)
    return Case(FAMILIES[name], attention)


def token_ids(rows: int = B, length: int = S, seed: int = 2) -> torch.Tensor:
    """Random token ids `(rows, length)`, none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def allowed(
    length: int,
    window: int | None,
    *,
    prefix: int = 0,
    padding: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which keys each query may see, `(rows or 1, 1, length, prefix + length)`, from the rulings alone.

    Args:
        length: tokens.
        window: sliding window.
        prefix: keys in front that nothing hides.
        padding: `(rows, length)`, 1 for real tokens.
        mask: in place of causality and window, `(rows or 1, 1, length, length)`.
    """
    if mask is None:
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        mask = ((distance >= 0) & (distance < (window or length)))[None, None]
    if padding is not None:
        mask = mask & padding[:, None, None, :].bool()
    return torch.cat([torch.ones(*mask.shape[:3], prefix, dtype=torch.bool), mask], dim=-1)


def reference_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attention in float64 with `module.reference_prefix`, two tensors `(G, T, D)`, in front of keys and values."""
    keys, values = (
        torch.cat([prefix.expand(states.shape[0], -1, -1, -1).to(states), states], dim=2)
        for prefix, states in zip(module.reference_prefix, (key, value), strict=True)
    )
    heads = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(heads, dim=1).double(), values.repeat_interleave(heads, dim=1).double()
    scores = torch.einsum("bhqd,bhkd->bhqk", query.double(), keys) * kwargs["scaling"] + mask.double()
    return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), values).to(query.dtype), None


class Reference:
    """The streams of a wrapped model, run by hand on the plain backbone.

    Each stream is a run of its own with its prefix as the first entries of a cache, where they stand without parscale's
    code (in MLA, whose cache is compressed, in front of keys and values in an attention function of these tests); the
    streams are mixed token by token in float64.

    Args:
        family: of the model.
        plain: a model with the same weights that was never wrapped.
        model: the wrapped one.
    """

    def __init__(self, family: Family, plain: Any, model: Any) -> None:
        self.family, self.plain = family, plain
        tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
        keys = [tensor for name, tensor in tensors.items() if name.endswith(".prefix_k")]
        values = [tensor for name, tensor in tensors.items() if name.endswith(".prefix_v")]
        self.prefixes = list(zip(keys, values, strict=True))
        self.aggregator = {
            name.split("aggregate_layer.")[1]: tensor.double()
            for name, tensor in tensors.items()
            if "aggregate_" in name
        }
        self.smoothing = model.config.parscale_attn_smooth

    def _cache(self, p: int, rows: int) -> DynamicCache:
        cache = DynamicCache()  # without a configuration: no layer forgets what is beyond its window
        number = self.plain.config.get_text_config().num_hidden_layers
        if self.family.attention_layers is not None:
            cache = DynamicCache(config=self.plain.config)
        for layer, (k, v) in zip(self.family.attention_layers or range(number), self.prefixes, strict=True):
            cache.update(*(x[p].expand(rows, -1, -1, -1).clone() for x in (k, v)), layer)
        return cache

    @torch.no_grad()
    def hidden(self, p: int, ids: torch.Tensor, positions: torch.Tensor | None = None, **mask: Any) -> torch.Tensor:
        """Final hidden states `(rows, length, H)` of stream p; further arguments as `allowed`."""
        rows, length = ids.shape
        config = self.plain.config.get_text_config()

        def additive(window: int | None) -> torch.Tensor:
            seen = allowed(length, window, prefix=self.prefixes[0][0].shape[2], **mask).expand(rows, -1, -1, -1)
            return torch.zeros(seen.shape, dtype=self.plain.dtype).masked_fill(~seen, torch.finfo(self.plain.dtype).min)

        kinds = {self.family.window_of(config, i) for i in range(config.num_hidden_layers)}
        masks: Any = additive(self.family.window)
        if len(kinds) > 1:
            masks = {"full_attention": additive(None), "sliding_attention": masks}
        if self.family.attention_layers is not None:
            masks = {"full_attention": masks, "linear_attention": mask.get("padding")}
        positions = torch.arange(length).expand(rows, -1) if positions is None else positions
        arguments = {"input_ids": ids, "attention_mask": masks, "position_ids": positions}
        if not self.family.latent_cache:
            decoder = self.plain.get_decoder()
            is_new = "cache" in inspect.signature(decoder.forward).parameters  # since transformers 5.24
            arguments["cache" if is_new else "past_key_values"] = self._cache(p, rows)
            return decoder(**arguments)[0]
        transformers.AttentionInterface.register("reference", reference_attention)
        layers = [module for name, module in self.plain.named_modules() if name.endswith("self_attn")]
        for layer, (k, v) in zip(layers, self.prefixes, strict=True):
            layer.reference_prefix = k[p], v[p]
        previous = self.plain.config._attn_implementation
        self.plain.config._attn_implementation = "reference"
        try:
            return self.plain.get_decoder()(**arguments, use_cache=False)[0]
        finally:
            self.plain.config._attn_implementation = previous

    def weights(self, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        """Aggregation weights `(rows, length, P)` in float64."""
        x = torch.stack([h.double() for h in hidden], dim=-1)  # (rows, length, H, P)
        inner = x.reshape(*x.shape[:2], -1) @ self.aggregator["0.weight"].T + self.aggregator["0.bias"]
        logits = (inner * torch.sigmoid(inner)) @ self.aggregator["2.weight"].T + self.aggregator["2.bias"]
        exponentials = torch.exp(logits - logits.max(-1, keepdim=True).values)
        weights = exponentials / exponentials.sum(-1, keepdim=True)
        return weights * (1 - self.smoothing) + self.smoothing / x.shape[-1]

    @torch.no_grad()
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of final hidden states."""
        logits = self.plain.get_output_embeddings()(hidden.to(self.plain.dtype))
        cap = getattr(self.plain.config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def logits(self, ids: torch.Tensor, positions: torch.Tensor | None = None, **mask: Any) -> torch.Tensor:
        """Logits `(rows, length, vocabulary)` of the mixture."""
        hidden = [self.hidden(p, ids, positions, **mask) for p in range(len(self.prefixes[0][0]))]
        weights = self.weights(hidden)
        return self.head(sum(w[..., None] * h.double() for w, h in zip(weights.unbind(-1), hidden, strict=True)))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Asserts the largest absolute difference; logits here are of size 1."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= tolerance, f"largest difference {error:.2e} exceeds {tolerance:.0e}"
