"""Architectures whose attention is their own and reads a cache: BLOOM, Falcon, GPT-J, MPT, decoders of the BERT kind.

Their reference is the plain backbone with each stream's prefix as the first entries of a cache. Where a backbone counts
positions by the cache's length alone, its table of positions is moved for that.
"""

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, EncoderDecoderCache

import parscale
from parscale import UnsupportedModelError

TOLERANCE = 2e-5  # logits of size 1; measured: 4e-6 at most
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

    Args:
        model_type: of its configuration.
        options: of its configuration.
        positions: how tokens get theirs: ``"given"`` (an argument), ``"alibi"``, ``"length"`` (the cache's), ``"own"``.
        relative: a text that was read before is the same as a prefix.
        caches: it continues with new tokens alone.
        checkpoints: it knows gradient checkpointing.
        static: it knows static caches.
    """

    model_type: str
    options: dict
    positions: str = "given"
    relative: bool = False
    caches: bool = True
    checkpoints: bool = True
    static: bool = True

    def plain(self, dtype=torch.float32, **changes):
        config = transformers.CONFIG_MAPPING[self.model_type](**TOKENS | self.options | changes)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                if parameter.requires_grad:  # a table of sines is not
                    randomize(parameter)
        return model.to(dtype).eval()


def randomize(parameter):
    with torch.no_grad():
        noise = torch.randn_like(parameter)
        parameter.add_(noise, alpha=0.3) if parameter.ndim < 2 else parameter.copy_(noise * parameter.shape[-1] ** -0.5)


FALCON = SIZES | NO_DROPOUT
KINDS = {
    "bloom": Kind("bloom", {"hidden_size": 48, "n_layer": 2, "n_head": 6} | NO_DROPOUT, "alibi", True),
    "codegen": Kind("codegen", GPT | {"n_ctx": 64, "rotary_dim": 4, "attn_pdrop": 0.0}, relative=True),
    "gptj": Kind("gptj", GPT | {"rotary_dim": 4, "attn_pdrop": 0.0}, relative=True),
    "falcon multi-query": Kind("falcon", FALCON | {"multi_query": True}, relative=True),
    "falcon grouped": Kind("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, relative=True),
    "falcon alibi": Kind(
        "falcon", FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}, "alibi", True
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
        static=False,
    ),
    "gpt_neox_japanese": Kind(
        "gpt_neox_japanese", SIZES | NO_DROPOUT | {"intermediate_multiple_size": 2}, relative=True, checkpoints=False
    ),
    "mpt": Kind("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, "alibi", True),
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
    "megatron-bert": Kind("megatron-bert", BERT, static=False),
    "rembert": Kind("rembert", BERT | {"input_embedding_size": 32, "output_embedding_size": 32}, static=False),
    "roformer": Kind("roformer", BERT, "length", True, static=False),
    "big_bird": Kind("big_bird", BERT | {"attention_type": "original_full"}, static=False),
    "mvp": Kind("mvp", DECODER, "length", static=False),
    "trocr": Kind("trocr", DECODER | {"use_learned_position_embeddings": True}, "length", static=False),
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
        checkpoints=False,
        static=False,
    ),
    "xlm": Kind(
        "xlm",
        {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True, "max_position_embeddings": 64, "n_langs": 1}
        | {"dropout": 0.0, "attention_dropout": 0.0},
        "own",
        caches=False,
        checkpoints=False,
        static=False,
    ),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def those(**properties):
    """The kinds with these properties, for ``parametrize``."""
    names = [n for n, kind in KINDS.items() if all(getattr(kind, k) == v for k, v in properties.items())]
    return pytest.mark.parametrize("kind", names, indirect=False)


@pytest.fixture
def wrapped(zoo):
    """Makes a model with streams that differ and matter."""

    def make(kind, num_streams=P, **changes):
        model = parscale.wrap(kind.plain(**changes), num_streams, prefix_length=T, init="random")
        zoo.fill_streams(model)
        return model

    return make


@torch.no_grad()
def logits_of(model, ids, **arguments):
    return model(input_ids=ids, **arguments).logits


def head(model, hidden):
    return model.cls(hidden) if hasattr(model, "cls") else model.get_output_embeddings()(hidden)


def make_reference(zoo, kind, model, **changes):
    """What the wrapped ``model`` should give, in the manner of the zoo's own reference."""

    class Reference(zoo.Reference):
        def hidden(self, p, ids):
            backbone = self.plain.get_submodule(model.parscale.decoder_name)
            rows, length = ids.shape
            prefix = [(k[p].expand(rows, -1, -1, -1), v[p].expand(rows, -1, -1, -1)) for k, v in self.prefixes]
            if kind.positions == "own":
                with hand_made_attention(backbone, prefix):
                    return backbone(ids)[0]
            cache = DynamicCache()
            for layer, (k, v) in enumerate(prefix):
                cache.update(k.clone(), v.clone(), layer)
            mask = torch.ones(rows, T + length, dtype=torch.long)
            given = {"position_ids": torch.arange(length)[None]} if kind.positions == "given" else {}
            if kind.model_type == "gpt_neo":
                return self._with_window(backbone, ids, cache, given)
            with positions_moved(backbone if kind.positions == "length" else None):
                return backbone(ids, attention_mask=mask, past_key_values=cache, **given)[0]

        def _with_window(self, backbone, ids, cache, given):
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
                return backbone(ids, past_key_values=cache, **given)[0]
            finally:
                for hook in hooks:
                    hook.remove()

        def head(self, hidden):
            return head(self.plain, hidden.to(self.plain.dtype))

    if kind.model_type == "gpt_neo":
        changes = changes | {"window_size": 64}
    return Reference(None, kind.plain(**changes), model)
