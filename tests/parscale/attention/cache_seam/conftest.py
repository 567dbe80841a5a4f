"""Architectures whose attention is their own and reads a cache: BLOOM, Falcon, GPT-J, MPT, decoders of the BERT kind.

Their reference is the plain backbone with each stream's prefix as the first entries of a cache. Where a backbone counts
positions by the cache's length alone, its table of positions is moved for that.
"""

import contextlib
import dataclasses
import functools

import pytest
import torch
import transformers
from model_calls import given
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

import parscale

P, T = 3, 6
WINDOW = 5  # shorter than the prefix

TOKENS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
BERT = SIZES | {
    "intermediate_size": 48,
    "is_decoder": True,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DECODER = {
    "d_model": 32,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    **{f"{side}_layers": 2 for side in ("decoder", "encoder")},
    **{f"{side}_attention_heads": 4 for side in ("decoder", "encoder")},
    **{f"{side}_ffn_dim": 48 for side in ("decoder", "encoder")},
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A tiny model.

    Attributes:
        model_type: of its configuration.
        options: of its configuration.
        positions: how tokens get theirs: `"given"` (an argument), `"alibi"`, `"length"` (the cache's), `"own"`.
        caches: it continues with new tokens alone.
    """

    model_type: str
    options: dict
    positions: str = "given"
    caches: bool = True

    def plain(self, dtype=torch.float32, **changes):
        config = transformers.CONFIG_MAPPING[self.model_type](**TOKENS | self.options | changes)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                if parameter.requires_grad:  # a table of sines is not
                    randomize(parameter)
        return model.to(dtype).eval()

    def need_causality(self, zoo):
        """Skips what caches promise, where the plain backbone does not look back only."""
        ids = zoo.token_ids()
        other = torch.cat([ids[:, :-1], 3 + ids[:, -1:] % 90], dim=1)
        with torch.no_grad():
            if not torch.equal(*(self.plain()(input_ids=x).logits[:, :-1] for x in (ids, other))):
                pytest.skip(f"transformers {transformers.__version__} lets tokens of {self.model_type} see later ones")


def randomize(parameter):
    with torch.no_grad():
        noise = torch.randn_like(parameter)
        parameter.add_(noise, alpha=0.3) if parameter.ndim < 2 else parameter.copy_(noise * parameter.shape[-1] ** -0.5)


FALCON = SIZES | NO_DROPOUT
KINDS = {
    "bloom": Kind("bloom", {"hidden_size": 48, "n_layer": 2, "n_head": 6} | NO_DROPOUT, "alibi"),
    "codegen": Kind("codegen", GPT | {"n_ctx": 64, "rotary_dim": 4, "attn_pdrop": 0.0}),
    "gptj": Kind("gptj", GPT | {"rotary_dim": 4, "attn_pdrop": 0.0}),
    "falcon multi-query": Kind("falcon", FALCON | {"multi_query": True}),
    "falcon grouped": Kind("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon alibi": Kind(
        "falcon",
        FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        "alibi",
    ),
    "gpt_neo": Kind(
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            "max_position_embeddings": 64,
            "resid_dropout": 0.0,
            "embed_dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "gpt_neox_japanese": Kind("gpt_neox_japanese", SIZES | NO_DROPOUT | {"intermediate_multiple_size": 2}),
    "mpt": Kind("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, "alibi"),
    "xglm": Kind(
        "xglm",
        {
            "d_model": 32,
            "num_layers": 2,
            "attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
        },
    ),
    "megatron-bert": Kind("megatron-bert", BERT),
    "rembert": Kind("rembert", BERT | {"input_embedding_size": 32, "output_embedding_size": 32}),
    "roformer": Kind("roformer", BERT, "length"),
    "big_bird": Kind("big_bird", BERT | {"attention_type": "original_full"}),
    "mvp": Kind("mvp", DECODER, "length"),
    "trocr": Kind("trocr", DECODER | {"use_learned_position_embeddings": True}, "length"),
    "cpmant": Kind(
        "cpmant",
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "dim_head": 8,
            "dim_ff": 48,
            "num_hidden_layers": 2,
            "prompt_length": 4,
            "prompt_types": 8,
            "segment_types": 8,
            "position_bias_num_buckets": 16,
            "position_bias_max_distance": 32,
        },
        "own",
        caches=False,
    ),
    "xlm": Kind(
        "xlm",
        {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True, "max_position_embeddings": 64, "n_langs": 1}
        | {"dropout": 0.0, "attention_dropout": 0.0},
        "own",
        caches=False,
    ),
}


@pytest.fixture
def kinds():
    """All, by their names."""
    return KINDS


@pytest.fixture(params=KINDS)
def kind(request):
    """Each of them; `@pytest.mark.parametrize("kind", [...], indirect=True)` narrows it down."""
    return KINDS[request.param]


@pytest.fixture
def wrapped(zoo):
    """Makes a model with streams that differ and matter."""

    def make(kind, num_streams=P, **changes):
        model = parscale.wrap(kind.plain(**changes), num_streams, prefix_length=T, init="random")
        zoo.fill_streams(model)
        return model

    return make


def head(model, hidden):
    return model.cls(hidden) if hasattr(model, "cls") else model.get_output_embeddings()(hidden)


@contextlib.contextmanager
def positions_moved(backbone):
    """In this block the token after a prefix of T keys has position 0."""
    tables = [m for n, m in backbone.named_modules() if n.endswith("embed_positions")] if backbone is not None else []
    own = [table.weight.detach().clone() for table in tables]
    try:
        for table in tables:
            table.weight.data = table.weight.data.roll(T, dims=0)
        yield
    finally:
        for table, weight in zip(tables, own, strict=True):
            table.weight.data = weight


@contextlib.contextmanager
def hand_made_attention(backbone, prefixes):
    """In this block CPM-Ant and XLM attend in float64 to `prefixes`, keys and values `(rows, G, T, D)`, as well."""

    def attend(module, q, k, v, seen, bias, heads):
        q, k, v = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        k, v = (torch.cat([prefix.double(), x], dim=2) for prefix, x in zip(prefix_of[id(module)], (k, v), strict=True))
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + nn.functional.pad(bias.double(), (T, 0))
        seen = torch.cat([torch.ones(*seen.shape[:-1], T, dtype=torch.bool), seen], dim=-1)[:, None]
        return (scores.masked_fill(~seen, -1e30).softmax(-1) @ v).transpose(1, 2).flatten(2).float()

    def cpmant(self, hidden, _, mask, bias, *args):
        projected = (layer(hidden) for layer in (self.project_q, self.project_k, self.project_v))
        return self.attention_out(attend(self, *projected, mask.bool(), bias, self.num_heads)), None

    def xlm(self, hidden, mask, **_):
        projected = (layer(hidden) for layer in (self.q_lin, self.k_lin, self.v_lin))
        return (self.out_lin(attend(self, *projected, mask.bool(), torch.zeros(mask.shape[-1]), self.n_heads)),)

    endings = {"self_att.self_attention": cpmant, **{f"attentions.{i}": xlm for i in range(2)}}
    layers = [(m, f) for n, m in backbone.named_modules() for end, f in endings.items() if n.endswith(end)]
    prefix_of = {id(layer): prefix for (layer, _), prefix in zip(layers, prefixes, strict=True)}
    try:
        for layer, function in layers:
            layer.forward = functools.partial(function, layer)
        yield
    finally:
        for layer, _ in layers:
            del layer.forward


@pytest.fixture
def reference(zoo):
    """Makes the zoo's reference of what a wrapped model should give, with another way to a stream's hidden states."""
    return functools.partial(make_reference, zoo)


def make_reference(zoo, kind, model):
    class Reference(zoo.Reference):
        @torch.no_grad()
        def hidden(self, p, ids, positions=None):
            backbone = self.plain.get_submodule(model.parscale.backbone_name)
            rows, length = ids.shape
            prefix = [(k[p].expand(rows, -1, -1, -1), v[p].expand(rows, -1, -1, -1)) for k, v in self.prefixes]
            if kind.positions == "own":
                with hand_made_attention(backbone, prefix):
                    return backbone(ids)[0]
            cache = DynamicCache()
            for layer, (k, v) in enumerate(prefix):
                cache.update(k.clone(), v.clone(), layer)
            mask = torch.ones(rows, T + length, dtype=torch.long)
            options = {"position_ids": torch.arange(length)[None]} if kind.positions == "given" else {}
            if kind.model_type == "gpt_neo":
                return self._with_window(backbone, ids, cache, options)
            with positions_moved(backbone if kind.positions == "length" else None):
                return backbone(ids, attention_mask=mask, **given(backbone, cache), **options)[0]

        def _with_window(self, backbone, ids, cache, options):
            """The plain model has wide windows here; the mask of each layer has its own."""
            rows, length = ids.shape

            def narrow(module, args, kwargs):
                window = None if module.attention_type == "global" else WINDOW
                seen = zoo.allowed(length, window, prefix=T).expand(rows, -1, -1, -1)
                mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
                return args, kwargs | {"attention_mask": mask}

            layers = [m for n, m in backbone.named_modules() if n.endswith("attn.attention")]
            kinds = ["global", "local"]
            hooks = []
            for layer, name in zip(layers, kinds, strict=True):
                layer.attention_type = name
                hooks.append(layer.register_forward_pre_hook(narrow, with_kwargs=True))
            try:
                return backbone(ids, **given(backbone, cache), **options)[0]
            finally:
                for hook in hooks:
                    hook.remove()

        def head(self, hidden):
            return head(self.plain, hidden.to(self.plain.dtype))

    return Reference(None, kind.plain(**({"window_size": 64} if kind.model_type == "gpt_neo" else {})), model)
