"""Architectures whose attention is their own and reads a cache: BLOOM, Falcon, GPT-J, MPT, decoders of the BERT kind.

Their reference is the plain backbone with each stream's prefix as the first entries of a cache. Where a backbone counts
positions by the cache's length alone, its table of positions is moved for that.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
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
        "falcon", FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        "alibi",
        True,
        static=False,
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
    """In this block CPM-Ant and XLM attend in float64 to ``prefixes``, keys and values ``(rows, G, T, D)``, as well."""

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


def make_reference(zoo, kind, model, **changes):
    """What the wrapped ``model`` should give, in the manner of the zoo's own reference."""

    class Reference(zoo.Reference):
        @torch.no_grad()
        def hidden(self, p, ids, positions=None):
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


def padded(ids, amount, pad=0):
    """Left padding, in the first row only, and the mask."""
    rows, length = ids.shape
    wide = torch.cat([torch.full((rows, amount), pad), ids], dim=1)
    mask = torch.ones_like(wide)
    mask[:, :amount] = 0
    return wide, mask


# -- against the reference


def test_streams_are_runs_with_a_cache_that_has_the_prefix(kind, zoo, wrapped):
    model, ids = wrapped(kind), zoo.token_ids()
    zoo.close(logits_of(model, ids, use_cache=False), make_reference(zoo, kind, model).logits(ids), TOLERANCE)
    zoo.close(logits_of(model, ids, use_cache=True), make_reference(zoo, kind, model).logits(ids), TOLERANCE)


@those(relative=True)
def test_each_stream_has_read_its_text(kind, zoo):
    kind = KINDS[kind]
    model, plain, texts = kind.plain(), kind.plain(), zoo.token_ids(P, 12, seed=8)
    ids = zoo.token_ids()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing here is an approximation
        parscale.wrap(model, P, prefix_length=12, smoothing=0.0, init="context", calibration=texts)
    last = model.get_submodule(model.parscale.decoder_name).aggregate_layer[2]
    for p, text in enumerate(texts):
        with torch.no_grad():
            last.weight.zero_()
            last.bias.fill_(-1e4)[p] = 1e4
        expected = logits_of(plain, torch.cat([text.expand(zoo.B, -1), ids], dim=1))[:, 12:]
        zoo.close(logits_of(model, ids), expected, TOLERANCE)


@pytest.mark.parametrize("kind", ["gpt_neo", "xglm", "megatron-bert", "rembert", "big_bird", "mvp", "trocr"])
def test_where_reading_a_text_is_an_approximation_it_says_so(kind, zoo):
    with pytest.warns(UserWarning, match="learned positions.*approximation"):
        model = parscale.wrap(KINDS[kind].plain(), P, prefix_length=12)
    assert logits_of(model, zoo.token_ids()).isfinite().all()


# -- caches, padding, generation


@those(caches=True)
def test_cached_equals_full(kind, zoo, wrapped):
    model, ids = wrapped(KINDS[kind]), zoo.token_ids(length=12)
    full = logits_of(model, ids, use_cache=False)
    for sizes in ([1] * 12, [5, 4, 3], [11, 1]):
        cache, logits = None, []
        for piece in ids.split(sizes, dim=1):
            with torch.no_grad():
                output = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        zoo.close(torch.cat(logits, dim=1), full, TOLERANCE)
        assert cache.get_seq_length() == 12
        own = getattr(cache, "self_attention_cache", cache)
        assert type(own) is DynamicCache
        assert own.layers[0].keys.shape[0] == P * zoo.B


PADS = [name for name, kind in KINDS.items() if kind.positions in ("given", "alibi")]


@pytest.mark.parametrize("kind", PADS)
@pytest.mark.parametrize("attended", ["full", "cached"])
def test_left_padding(kind, attended, zoo, wrapped):
    kind = KINDS[kind]
    model, ids = wrapped(kind), zoo.token_ids()
    expected = logits_of(model, ids)
    wide, mask = padded(ids, 4)
    given = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if kind.positions == "given" else {}
    if attended == "full":
        logits = logits_of(model, wide, attention_mask=mask, **given)
    else:
        pieces, cache = [], None
        for start, end in ((0, 8), (8, 9), (9, 13)):
            now = {name: x[:, start:end] for name, x in given.items()}
            with torch.no_grad():
                output = model(
                    input_ids=wide[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True, **now
                )
            cache = output.past_key_values
            pieces.append(output.logits)
        logits = torch.cat(pieces, dim=1)
    zoo.close(logits[:, 4:], expected, TOLERANCE)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_is_generation_without(kind, beams, zoo, wrapped):
    # CPM-Ant's tokens see what follows them, which a cache does not bring to earlier ones: nothing in a single layer
    model, ids = wrapped(kind, **({"num_hidden_layers": 1} if kind.model_type == "cpmant" else {})), zoo.token_ids()
    plain = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    outputs = [model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use, **plain) for use in (True, False)]
    assert torch.equal(*outputs)
    assert outputs[0].shape == (zoo.B, zoo.S + 8)


@those(static=True, caches=True)
def test_static_caches(kind, zoo, wrapped):
    model, ids = wrapped(KINDS[kind]), zoo.token_ids()
    plain = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wide, mask = padded(ids, 3)
    static = model.generate(wide, attention_mask=mask, cache_implementation="static", **plain)
    assert torch.equal(static, model.generate(wide, attention_mask=mask, **plain))


# -- training


def loss_of(model, ids):
    no_cache = {"use_cache": False} if "use_cache" in inspect.signature(type(model).forward).parameters else {}
    logits = model(input_ids=ids, **no_cache).logits[:, :-1]  # RoFormer's own checkpointing fails with a cache
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def gradients_of(model, ids):
    model.zero_grad()
    loss_of(model, ids).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if "prefix_" in name or "aggregate" in name}


def test_gradients_reach_every_prefix(kind, zoo, wrapped):
    gradients = gradients_of(wrapped(kind).train(), zoo.token_ids())
    assert len(gradients) == 8
    assert all(g.flatten(1).norm(dim=1).min() > 1e-6 for name, g in gradients.items() if "prefix_" in name)


@those(checkpoints=True)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing(kind, reentrant, frozen, zoo, wrapped):
    model, ids = wrapped(KINDS[kind]).train(), zoo.token_ids()
    if frozen:
        model.freeze_backbone()
    expected = gradients_of(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for name, gradient in gradients_of(model, ids).items():
        zoo.close(gradient, expected[name], 1e-6)


@pytest.mark.parametrize("kind", ["gpt_neox_japanese", "megatron-bert", "rembert"])
def test_gradients_against_finite_differences(kind, zoo, wrapped):
    model, ids = wrapped(KINDS[kind], dtype=torch.float64), zoo.token_ids()
    gradients = gradients_of(model, ids)
    for name, parameter in model.named_parameters():
        if "prefix_" not in name:
            continue
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        losses = []
        direction /= direction.norm()
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                losses.append(loss_of(model, ids))
                parameter.add_(direction, alpha=-step)
        slope = (losses[0] - losses[1]) / 2e-4
        zoo.close((gradients[name] * direction).sum(), slope, 1e-8)


# -- identity, saving, copies


def test_without_streams_nothing_is_in_the_way(kind, zoo, wrapped):
    plain, model, ids = kind.plain(), wrapped(kind), zoo.token_ids()
    expected = logits_of(plain, ids)
    names = set(dict(plain.named_parameters()))
    with model.use_streams(None):
        assert torch.equal(logits_of(model, ids), expected)
    assert not torch.equal(logits_of(model, ids), expected)
    parscale.unwrap(model)
    assert torch.equal(logits_of(model, ids), expected)
    assert set(dict(model.named_parameters())) == names
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    one = parscale.wrap(model, 1)
    assert torch.equal(logits_of(one, ids), expected)
    assert set(dict(one.named_parameters())) == names


def test_saving_and_loading(kind, zoo, wrapped, tmp_path):
    model, ids = wrapped(kind), zoo.token_ids()
    expected = logits_of(model, ids)
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(logits_of(parscale.load(tmp_path / "full").eval(), ids), expected)
    model.save_streams(tmp_path / "streams")
    assert torch.equal(logits_of(parscale.load(tmp_path / "streams", backbone=kind.plain()).eval(), ids), expected)


def test_copies(kind, zoo, wrapped):
    model, ids = wrapped(kind), zoo.token_ids()
    expected = logits_of(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(twin, ids), expected)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if name.endswith("prefix_v"):
                    parameter.zero_()
        assert not torch.equal(logits_of(twin, ids), expected)
        assert torch.equal(logits_of(model, ids), expected)
        parscale.unwrap(twin)
        assert torch.equal(logits_of(twin, ids), logits_of(kind.plain(), ids))


def test_attentions_have_columns_for_the_prefix(kind, zoo, wrapped):
    with torch.no_grad():
        attentions = wrapped(kind)(input_ids=zoo.token_ids(), output_attentions=True).attentions
    assert len(attentions) == 2
    for weights in attentions:
        assert weights.shape[0] == P * zoo.B
        assert weights.shape[-2:] == (zoo.S, T + zoo.S)
        assert weights[..., :T].min() > 0


def test_compiled(kind, zoo, wrapped):
    model, ids = wrapped(kind), zoo.token_ids()
    expected = logits_of(model, ids, use_cache=False)
    zoo.close(logits_of(torch.compile(model, backend="aot_eager"), ids, use_cache=False), expected, TOLERANCE)
