"""Flash-attention: transformers' own code around it, run on a stand-in for the two functions of its package."""

import inspect
import sys
import threading

import pytest
import torch
import transformers
from flash_stand_in import StandIn
from model_calls import logits_of
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import parscale
from parscale.compat.flash import flash_in_torch
from parscale.methods import adaptive_streams

TOLERANCE = 5e-5  # float32 rounding of logits of size 1 to 5 through two to four layers; measured: 2.2e-5 at most
FAMILIES = ["llama", "mistral", "gemma2", "gemma3", "gpt_neox", "deepseek_v3", "gpt_oss", "qwen3_next"]
PLAIN = ["llama", "deepseek_v3"]  # without a window
WINDOWED = ["mistral", "gemma2", "gemma3", "gpt_oss"]
HUB_NAME = "someone/flash-kernel"


@pytest.fixture(params=["flash_attention_2", "flash_attention_3", HUB_NAME])
def implementation(request):
    """A name under which flash-attention runs."""
    return request.param


@pytest.fixture
def flash(monkeypatch):
    """Puts the stand-in where transformers imports flash-attention; call it with a model and the name to run under."""
    stand_in = StandIn(tuples=False)
    stand_in.install(monkeypatch)
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
    # what transformers does for a kernel from the Hub
    AttentionInterface.register(HUB_NAME, ALL_ATTENTION_FUNCTIONS["flash_attention_2"])
    AttentionMaskInterface.register(HUB_NAME, flash_attention_mask)

    def use(model, name="flash_attention_2"):
        stand_in.tuples = name == "flash_attention_3"
        # set_attn_implementation would look for the package
        model.config._attn_implementation = name
        return model

    use.stand_in = stand_in
    return use


def make(zoo, name, **changes):
    case = zoo.Case(zoo.FAMILIES[name], "eager")
    return case, case.wrapped(**changes)


def test_the_stand_in_has_the_packages_signature():
    """Its arguments, in this order, are those of flash-attn 2.8 that transformers uses (s_aux is of a Hub kernel)."""
    for function, first in (
        (StandIn.flash_attn_func, ["self", "q", "k", "v", "dropout_p"]),
        (StandIn.flash_attn_varlen_func, ["self", "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q"]),
    ):
        assert list(inspect.signature(function).parameters)[: len(first)] == first


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stand_in_is_right_about_the_plain_backbone(name, flash, zoo):
    case = zoo.Case(zoo.FAMILIES[name], "eager")
    plain, ids = case.plain(), zoo.token_ids()
    expected = logits_of(plain, ids)
    zoo.close(logits_of(flash(plain), ids), expected, TOLERANCE)
    assert flash.stand_in.calls


@pytest.mark.parametrize("name", FAMILIES)
def test_forward(name, implementation, flash, zoo):
    case, model = make(zoo, name)
    ids, expected = zoo.token_ids(), case.reference(model).logits(zoo.token_ids())
    flash(model, implementation)
    zoo.close(logits_of(model, ids), expected, TOLERANCE)
    with model.use_streams(None):
        assert torch.equal(logits_of(model, ids), logits_of(flash(case.plain(), implementation), ids))


def test_large_biases_of_keys(flash, zoo):
    """With and without a cache, and padded."""
    case = zoo.Case(zoo.BIASED)
    model, ids, padding = case.wrapped(), zoo.token_ids(), torch.ones(zoo.B, zoo.S, dtype=torch.long)
    padding[1, :3] = 0
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    reference = case.reference(model)
    expected, behind = reference.logits(ids), reference.logits(ids, positions, padding=padding)
    flash(model)
    zoo.close(logits_of(model, ids), expected, zoo.BIASED_TOLERANCE)
    cache = DynamicCache(config=model.config)
    pieces = [logits_of(model, piece, cache=cache) for piece in ids.split([5, 3, 1], dim=1)]
    zoo.close(torch.cat(pieces, dim=1), expected, zoo.BIASED_TOLERANCE)
    logits = logits_of(model, ids, attention_mask=padding)
    zoo.close(logits[padding.bool()], behind[padding.bool()], zoo.BIASED_TOLERANCE)


@pytest.mark.grid
@pytest.mark.parametrize("chunks", [[1] * 9, [5, 3, 1]], ids=["token by token", "in chunks"])
@pytest.mark.parametrize("name", FAMILIES)
def test_with_a_cache(name, chunks, flash, zoo):
    case, model = make(zoo, name)
    ids, expected = zoo.token_ids(), case.reference(model).logits(zoo.token_ids())
    flash(model)
    caches = [DynamicCache(config=model.config)]
    if name != "qwen3_next":
        caches.append(DynamicCache())  # which forgets nothing that a window leaves behind
    for cache in caches:
        pieces = [logits_of(model, piece, cache=cache) for piece in ids.split(chunks, dim=1)]
        zoo.close(torch.cat(pieces, dim=1), expected, TOLERANCE)


@pytest.mark.grid
@pytest.mark.parametrize("given", [True, False], ids=["positions", "no positions"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_padding(name, side, given, flash, zoo):
    case, model = make(zoo, name)
    ids, padding = zoo.token_ids(), torch.ones(zoo.B, zoo.S, dtype=torch.long)
    (padding[1, :3] if side == "left" else padding[1, 6:]).zero_()
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    expected = case.reference(model).logits(ids, positions, padding=padding)
    arguments = {"position_ids": positions} if given else {}
    logits = logits_of(flash(model), ids, attention_mask=padding, **arguments)
    zoo.close(logits[padding.bool()], expected[padding.bool()], TOLERANCE)


@pytest.mark.grid
@pytest.mark.parametrize("given", [True, False], ids=["positions", "no positions"])
@pytest.mark.parametrize("name", FAMILIES)
def test_padded_decoding(name, given, flash, zoo):
    case, model = make(zoo, name)
    ids, padding = zoo.token_ids(), torch.ones(zoo.B, zoo.S, dtype=torch.long)
    padding[1, :3] = 0
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    expected = case.reference(model).logits(ids, positions, padding=padding)
    flash(model)
    cache, pieces, end = DynamicCache(config=model.config), [], 0
    for width in (5, 1, 1, 2):
        start, end = end, end + width
        now = slice(start, end)
        pieces.append(
            logits_of(
                model,
                ids[:, now],
                attention_mask=padding[:, :end],
                cache=cache,
                **({"position_ids": positions[:, now]} if given else {}),
            )
        )
    zoo.close(torch.cat(pieces, dim=1)[padding.bool()], expected[padding.bool()], TOLERANCE)


def documents(lengths):
    """What a collator gives for documents joined in one row."""
    edges = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return {
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@pytest.mark.grid
@pytest.mark.parametrize("given", ["positions", "boundaries", "boundaries through two rows"])
@pytest.mark.parametrize("name", [*PLAIN, *WINDOWED])
def test_packed_documents(name, given, flash, zoo):
    _, model = make(zoo, name)
    rows = 2 if "two rows" in given else 1
    lengths = [[6, 1, 2], [2, 7]][:rows]
    ids = zoo.token_ids(rows=rows)
    alone = torch.cat(
        [
            torch.cat([logits_of(model, piece) for piece in ids[b : b + 1].split(lengths[b], dim=1)], dim=1)
            for b in range(rows)
        ]
    )
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    arguments = {"position_ids": positions, "use_cache": False}
    if "boundaries" in given:
        arguments |= documents([n for row in lengths for n in row])
    zoo.close(logits_of(flash(model), ids, **arguments), alone, TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("kv", ["own", "shared"])
@pytest.mark.parametrize("given", ["positions", "boundaries"])
def test_packed_documents_are_found_once_for_all_layers(given, kv, name, flash, zoo, monkeypatch):
    """Each call of these waits for the device."""
    case = zoo.Case(zoo.FAMILIES[name], "eager")
    model = flash(case.wrapped() if kv == "own" else zoo.share(case.plain()))
    assert model.config.num_hidden_layers > 1
    waits = []

    def watch(method, own):
        def wait(x, *args):
            if sys._getframe(1).f_code.co_filename.endswith("attention/flash.py"):
                waits.append(method)
            return own(x, *args)

        monkeypatch.setattr(torch.Tensor, method, wait)

    for method in ("tolist", "item", "nonzero", "__int__", "__bool__"):
        watch(method, getattr(torch.Tensor, method))
    lengths = [6, 1, 2]
    arguments = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None], "use_cache": False}
    if given == "boundaries":
        arguments |= documents(lengths)
    logits_of(model, zoo.token_ids(rows=1), **arguments)
    assert waits == (["tolist"] if given == "boundaries" else ["nonzero", "tolist"])


@pytest.mark.parametrize("kv", ["own", "shared"])
def test_documents_that_a_collator_joins(kv, flash, zoo):
    """As transformers' own collator does with those of a batch."""
    case = zoo.Case(zoo.FAMILIES["llama"], "eager")
    model = case.wrapped() if kv == "own" else zoo.share(case.plain())
    pieces = zoo.token_ids(rows=1).split([6, 1, 2], dim=1)
    alone = torch.cat([logits_of(model, piece) for piece in pieces], dim=1)
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": piece[0]} for piece in pieces])
    del batch["labels"]
    found = flash(model)(**batch, use_cache=False).logits
    zoo.close(found, alone, TOLERANCE)


def test_positions_that_restart_in_several_rows_are_no_documents(flash, zoo):
    case, model = make(zoo, "llama")
    ids, positions = zoo.token_ids(), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(zoo.B, -1)
    expected = case.reference(model).logits(ids, positions)
    zoo.close(logits_of(flash(model), ids, position_ids=positions, use_cache=False), expected, TOLERANCE)


@pytest.mark.parametrize("given", ["positions", "boundaries"])
def test_the_last_logits_of_packed_documents(given, flash, zoo):
    """With shared keys: the streams' second pass would have fewer queries than the documents have tokens."""
    model = zoo.share(zoo.Case(zoo.FAMILIES["llama"], "eager").plain())
    ids, lengths = zoo.token_ids(rows=1), [6, 3]
    alone = logits_of(model, ids[:, 6:], logits_to_keep=2)
    arguments = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None], "use_cache": False}
    if given == "boundaries":
        arguments |= documents(lengths)
    zoo.close(logits_of(flash(model), ids, logits_to_keep=2, **arguments), alone, TOLERANCE)


def test_uncertain_tokens_of_packed_documents(flash, zoo):
    """Boundaries go through all rows, so that none is left out, though only one has tokens for the streams."""
    model = zoo.share(zoo.Case(zoo.FAMILIES["llama"], "eager").plain())
    ids, lengths = zoo.token_ids(rows=2), [6, 3, 9]
    pieces = ids.flatten()[None].split(lengths, dim=1)
    mixed = torch.cat([logits_of(model, piece) for piece in pieces], dim=1).view(2, 9, -1)
    with model.use_streams(None):
        alone = torch.cat([logits_of(model, piece) for piece in pieces], dim=1).view(2, 9, -1)
    entropy = torch.special.entr(alone.softmax(-1)).sum(-1)
    threshold = float(entropy.amax(dim=1).mean())
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, 9)
    with adaptive_streams(model, threshold):
        found = logits_of(flash(model), ids, position_ids=positions, use_cache=False, **documents(lengths))
    zoo.close(found, torch.where(entropy[..., None] > threshold, mixed, alone), TOLERANCE)


def test_boundaries_beside_a_cache_are_refused(flash, zoo):
    """They count new tokens only, and would cut the keys of earlier ones anywhere."""
    _, model = make(zoo, "llama")
    flash(model)
    cache = DynamicCache(config=model.config)
    logits_of(model, zoo.token_ids(rows=1), cache=cache)
    with pytest.raises(ValueError, match="cu_seq_lens_k"):
        logits_of(model, zoo.token_ids(rows=1), cache=cache, **documents([4, 5]))


@pytest.mark.parametrize(("window", "calls"), [(12, []), (13, ["batch"])])
def test_a_window_that_everything_fits_in_stays_with_flash_attention(window, calls, flash, zoo):
    """T + S = 13 keys: one token less, and the prefix would be hidden."""
    _, model = make(zoo, "mistral", sliding_window=window)
    eager = logits_of(model, zoo.token_ids())
    zoo.close(logits_of(flash(model), zoo.token_ids()), eager, TOLERANCE)
    assert flash.stand_in.calls == calls * model.config.num_hidden_layers


def test_a_window_to_both_sides(flash, zoo):
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "local_attention": 4, "pad_token_id": 0}
    config = transformers.ModernBertConfig(**sizes, attn_implementation="eager")
    model, ids = transformers.ModernBertForMaskedLM(config).eval(), zoo.token_ids()
    zoo.randomize(model)
    parscale.wrap(model, zoo.P, prefix_length=zoo.T, init="random")
    zoo.fill_streams(model)
    expected = logits_of(model, ids)
    zoo.close(logits_of(flash(model), ids), expected, TOLERANCE)


def test_short_documents_in_a_long_row_stay_with_flash_attention(flash, zoo):
    """The window is about a document, not about the row that it is packed in."""
    _, model = make(zoo, "mistral", sliding_window=8)
    ids = zoo.token_ids(rows=1)
    alone = torch.cat([logits_of(model, piece) for piece in ids.split([4, 2, 3], dim=1)], dim=1)
    positions = torch.cat([torch.arange(n) for n in (4, 2, 3)])[None]
    zoo.close(logits_of(flash(model), ids, position_ids=positions, use_cache=False), alone, TOLERANCE)
    assert flash.stand_in.calls == ["joined"] * model.config.num_hidden_layers


@pytest.mark.grid
@pytest.mark.parametrize("what", ["plain", "padded", "packed"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "deepseek_v3"])
def test_gradients(name, what, flash, zoo):
    """Of every parameter, against those of the eager functions."""
    _, model = make(zoo, name)
    ids, arguments = zoo.token_ids(), {}
    if what == "padded":
        arguments["attention_mask"] = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    elif what == "packed":
        ids, arguments = ids[:1], {"position_ids": torch.cat([torch.arange(n) for n in (6, 1, 2)])[None]}
    gradients = []
    for use in (lambda model: model, flash):
        model.zero_grad()
        logits = use(model)(ids, use_cache=False, **arguments).logits
        if what == "padded":
            logits = logits[arguments["attention_mask"].bool()]
        nn.functional.cross_entropy(logits.flatten(0, -2), torch.arange(logits.flatten(0, -2).shape[0])).backward()
        gradients.append({path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for path, gradient in gradients[0].items():
        zoo.close(gradients[1][path], gradient, 1e-5 * max(1.0, gradient.abs().max().item()))
    assert any("prefix_k" in path and gradient.ne(0).any() for path, gradient in gradients[1].items())


@pytest.mark.grid
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "deepseek_v3"])
def test_generate(name, cache, flash, zoo):
    """Greedy and with beams, one row padded, as under `eager`."""
    _, model = make(zoo, name)
    padding = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    arguments = {
        "attention_mask": padding,
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
    }
    for more in ({}, {"num_beams": 3}):
        model.config._attn_implementation = "eager"
        expected = model.generate(zoo.token_ids(), **arguments, **more)
        generated = flash(model).generate(zoo.token_ids(), **arguments, **more, cache_implementation=cache)
        assert torch.equal(generated, expected)
    assert flash.stand_in.calls or name == "mistral"  # whose layers all have a window


def test_half_precision_weights_after_a_float32_query(flash, zoo):
    """Where a query comes in float32 before half-precision weights (a norm that PEFT keeps), both ways cast it."""
    _, model = make(zoo, "mistral")
    for layer in model.parscale.layers:
        layer.module.o_proj.to(torch.bfloat16), layer.module.q_proj.to(torch.bfloat16)
        layer.module.q_proj.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype),))
        layer.module.q_proj.register_forward_hook(lambda module, args, output: output.float())
        layer.module.o_proj.register_forward_hook(lambda module, args, output: output.float())
    for length in (1, 9):  # by flash-attention, and by the mask that leaves the prefix out of the window
        assert logits_of(flash(model), zoo.token_ids(length=length)).isfinite().all()


@pytest.mark.filterwarnings("ignore:init='documents' is an approximation for GptOss")
@pytest.mark.parametrize("init", ["documents", "random"])
@pytest.mark.parametrize(("dtype", "on_gpu"), [(torch.bfloat16, False), (torch.float32, True), (torch.float32, False)])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_model_is_wrapped_before_flash_attention_can_run(name, dtype, on_gpu, init, flash, zoo):
    """On the CPU it cannot, or in float32; streams that start from texts are those of `eager`, but for rounding."""
    flash.stand_in.strict, flash.stand_in.on_gpu = True, on_gpu
    expected, model = (zoo.FAMILIES[name].build("eager", dtype=dtype) for _ in range(2))
    for each in (expected, flash(model)):
        parscale.wrap(each, zoo.P, prefix_length=zoo.T, init=init, seed=0)
        each.add_streams("other", zoo.P, prefix_length=zoo.T, init=init, seed=1)
    assert model.config._attn_implementation == "flash_attention_2"
    assert not flash.stand_in.calls
    tolerance = {torch.float32: TOLERANCE, torch.bfloat16: 0.05}[dtype]
    for path, parameter in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(path), parameter, atol=tolerance, rtol=0)
    flash.stand_in.strict = False
    zoo.close(logits_of(model.float(), zoo.token_ids()), logits_of(expected.float(), zoo.token_ids()), tolerance)
    assert flash.stand_in.calls


@pytest.mark.parametrize("what", ["plain", "padding", "positions", "boundaries", "rows"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3", "gpt_oss"])
def test_flash_attention_in_plain_torch_gives_the_same(name, what, flash, zoo):
    """Windows, caps, sinks, values of another size; padding and documents."""
    model = flash(zoo.FAMILIES[name].build("eager"))
    ids, given = zoo.token_ids(length=9), {"use_cache": False}
    if what == "padding":
        given["attention_mask"] = (torch.arange(9) >= torch.tensor([[2], [0]])).long()
    elif what in ("positions", "boundaries"):
        ids, given["position_ids"] = ids[:1], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
        if what == "boundaries":
            cut = torch.tensor([0, 4, 7, 9], dtype=torch.int32)
            given |= {"cu_seq_lens_q": cut, "cu_seq_lens_k": cut, "max_length_q": 4, "max_length_k": 4}
    real = given.get("attention_mask", torch.ones_like(ids)).bool()
    expected = logits_of(model, ids, **given)
    flash.stand_in.calls.clear()
    with flash_in_torch(model, torch.device("cpu")):
        found = logits_of(model, ids, **given)
    assert not flash.stand_in.calls
    zoo.close(found[real], expected[real], TOLERANCE)


def test_a_pass_in_another_thread_is_the_same_while_a_set_is_tried(flash, zoo):
    """It meets other attention in the middle, which sees as little of the future."""
    _, model = make(zoo, "llama")
    flash(model)
    ids, results = zoo.token_ids(), []
    expected = logits_of(model, ids)
    entered, swapped = threading.Event(), threading.Event()

    def wait(module, args):
        entered.set()
        assert swapped.wait(60)

    hook = model.model.layers[1].register_forward_pre_hook(wait)
    serving = threading.Thread(target=lambda: results.append(logits_of(model, ids)))
    serving.start()
    assert entered.wait(60)
    with flash_in_torch(model, torch.device("cpu")):
        swapped.set()
        serving.join()
    hook.remove()
    zoo.close(results[0], expected, TOLERANCE)


def test_an_attention_class_that_was_chosen_when_the_model_was_built(flash, monkeypatch):
    """It runs flash-attention whatever its configuration says later, so it is wrapped where that runs."""
    # as where the package is installed
    monkeypatch.setattr(transformers.PreTrainedModel, "_flash_attn_can_dispatch", lambda self, *args, **options: True)
    forward = transformers.modeling_flash_attention_utils._flash_attention_forward
    monkeypatch.setattr(
        transformers.models.gpt_neo.modeling_gpt_neo, "_flash_attention_forward", forward, raising=False
    )
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 64}
    config = transformers.GPTNeoConfig(**sizes, attention_types=[[["global"], 2]])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flash_attention_2", dtype=torch.bfloat16)
    flash.stand_in.strict = True
    said = r'made for flash-attention, which runs on a GPU and in half precision only.*"eager" where .*\(GPT-J'
    with pytest.raises(parscale.UnsupportedModelError, match=said):
        parscale.wrap(model, 2, prefix_length=3, init="random", seed=0)
    flash.stand_in.on_gpu = True
    assert parscale.wrap(model, 2, prefix_length=3, init="random", seed=0).num_streams == 2


def test_without_the_package_the_error_is_the_backbones(zoo):
    _, model = make(zoo, "llama")
    if transformers.utils.is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    with pytest.raises((ImportError, ValueError), match="FlashAttention2"):
        model.set_attn_implementation("flash_attention_2")
