"""Sets of streams that share keys and values: described, started, saved, switched, adapted, refused."""

import json
import pickle

import pytest
import torch
import transformers
from model_calls import exact_logits_of, given
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import parscale
from parscale import ParScaleConfig, UnsupportedModelError, load

NIGHTLY = [pytest.param(name, marks=pytest.mark.nightly) for name in ("qwen2", "mixtral")]
NAMES = ["llama", "gemma3", "gpt2", "deepseek_v3", *NIGHTLY]


@pytest.fixture
def llama(zoo):
    return zoo.Case(zoo.FAMILIES["llama"], "sdpa").plain()


# -- described


def test_a_configuration_says_so_in_a_field_of_its_own():
    fields = ParScaleConfig(4, kv="shared").to_fields()
    assert fields["parscale_kv"] == "shared"
    assert ParScaleConfig.from_fields(fields).kv == "shared"
    assert "parscale_kv" not in ParScaleConfig(4).to_fields()
    assert ParScaleConfig.from_fields(ParScaleConfig(4).to_fields()).kv == "own"


def test_what_a_configuration_refuses():
    with pytest.raises(ValueError, match="kv must be one of 'own', 'shared', got 'both'"):
        ParScaleConfig(4, kv="both")
    with pytest.raises(ValueError, match="kv='shared' takes transform='prefix' or 'lora', got 'prompt'"):
        ParScaleConfig(4, kv="shared", transform="prompt")


def test_the_first_stream_has_no_prefix(llama, zoo):
    before = dict(llama.named_parameters())
    parscale.wrap(llama, 4, prefix_length=5, init="random", kv="shared")
    new = {name: tuple(p.shape) for name, p in llama.named_parameters() if name not in before}
    assert new == {
        **{f"model.layers.{i}.self_attn.prefix_{x}": (3, 2, 5, 8) for i in range(2) for x in "kv"},
        "model.aggregate_layer.0.weight": (32, 4 * 32),
        "model.aggregate_layer.0.bias": (32,),
        "model.aggregate_layer.2.weight": (4, 32),
        "model.aggregate_layer.2.bias": (4,),
    }
    assert llama.config.parscale_kv == "shared"
    assert llama.num_streams == 4


# -- started


@pytest.mark.parametrize("init", ["context", "documents"])
def test_streams_start_as_texts(init, llama, zoo):
    """Each prefix holds the first layer's keys of its text, whose last token is the end of a text by default."""
    texts = zoo.token_ids(rows=2, length=6, seed=8)
    parscale.wrap(llama, 3, prefix_length=6, init=init, kv="shared", calibration=texts)
    read = texts.clone()
    read[:, -1] = texts[:, -1] if init == "context" else llama.config.eos_token_id
    with torch.no_grad(), llama.use_streams(None):
        cache = transformers.DynamicCache(config=llama.config)
        llama(read, position_ids=torch.arange(-6, 0).expand(2, -1), **given(llama, cache))
    for index, layer in enumerate(llama.model.layers):
        zoo.close(layer.self_attn.prefix_k, cache.layers[index].keys, 1e-5)
        zoo.close(layer.self_attn.prefix_v, cache.layers[index].values, 1e-5)


def test_texts_for_every_stream_are_one_too_many(llama, zoo):
    with pytest.raises(ValueError, match=r"\(num_streams - 1, prefix_length\) = \(2, 6\).* shape \(3, 6\)"):
        parscale.wrap(llama, 3, prefix_length=6, kv="shared", calibration=zoo.token_ids(rows=3, length=6))


def test_the_default_start(llama):
    parscale.wrap(llama, 3, prefix_length=6, kv="shared", seed=0)
    assert llama.parscale.active.config.init == "documents"
    prefix = llama.model.layers[0].self_attn.prefix_k
    assert prefix.isfinite().all()
    assert not torch.allclose(prefix[0], prefix[1], atol=1e-2)


# -- saved


@pytest.mark.parametrize("name", NAMES)
def test_folders_come_back_bit_for_bit(name, zoo, tmp_path):
    case, ids = zoo.Case(zoo.FAMILIES[name], zoo.FAMILIES[name].attention[-1]), zoo.token_ids()
    plain, model = case.plain(), zoo.share(case.plain())
    plain.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "full")
    model.save_streams(tmp_path / "streams")
    expected = exact_logits_of(model, ids)
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert config["parscale_kv"] == "shared"
    with safe_open(tmp_path / "streams" / "streams.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys() if "prefix_" in name}  # noqa: SIM118
    assert {shape[0] for shape in shapes.values()} == {zoo.P - 1}
    loaded = [load(tmp_path / "full"), load(tmp_path / "streams", backbone=str(tmp_path / "plain"))]
    for again in (*loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "full")):
        assert again.parscale.active.config.kv == "shared"
        assert torch.equal(exact_logits_of(again, ids), expected)
        assert torch.equal(exact_logits_of(again, ids, logits_to_keep=1), exact_logits_of(model, ids, logits_to_keep=1))


def test_a_damaged_number_of_streams_is_named(llama, zoo, tmp_path):
    zoo.share(llama).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"parscale_kv": "own"}))
    with pytest.raises(ValueError, match=r"prefix_[kv] .*\(2, 2, 4, 8\), but its configuration says \(3, heads, 4"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"parscale_kv": "mine"}))
    with pytest.raises(ValueError, match=r"kv must be one of 'own', 'shared', got 'mine'"):
        load(tmp_path)


def test_both_kinds_on_one_backbone(llama, zoo, tmp_path):
    """Switched, saved together, and taken off again."""
    ids = zoo.token_ids()
    plain = exact_logits_of(llama, ids)
    zoo.share(llama)
    llama.add_streams("own", 2, prefix_length=3, init="random")
    zoo.fill_streams(llama, seed=7, name="own")
    llama.save_pretrained(tmp_path)
    found, again = {}, load(tmp_path)
    for chosen in ("default", "own", None, "default"):
        llama.set_streams(chosen)
        again.set_streams(chosen)
        found[chosen] = exact_logits_of(llama, ids)
        assert torch.equal(exact_logits_of(again, ids), found[chosen])
        if chosen is not None:
            assert getattr(llama.config, "parscale_kv", "own") == ("own" if chosen == "own" else "shared")
    assert torch.equal(found[None], plain)
    assert (found["default"] - found["own"]).abs().max() > 0.1
    parscale.unwrap(llama)
    assert torch.equal(exact_logits_of(llama, ids), plain)
    assert not hasattr(llama.config, "parscale_kv")
    assert not [layer for layer in llama.model.layers if layer.self_attn._forward_pre_hooks]


def test_copies_and_pickles(llama, zoo):
    ids = zoo.token_ids()
    expected = exact_logits_of(zoo.share(llama), ids, logits_to_keep=1)
    again = pickle.loads(pickle.dumps(llama))
    assert torch.equal(exact_logits_of(again, ids, logits_to_keep=1), expected)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(ids, adaptive=1.0, **options), llama.generate(ids, adaptive=1.0, **options))


# -- adapted


def test_adapters_have_copies_that_share_keys(llama, zoo):
    peft = pytest.importorskip("peft")
    ids = zoo.token_ids()
    expected = exact_logits_of(zoo.share(llama), ids)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    tuned = peft.get_peft_model(llama, config)
    tuned.add_adapter("second", config)
    outputs = []
    for adapter in ("default", "second"):
        tuned.set_adapter(adapter)
        whole = exact_logits_of(tuned, ids)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        output = tuned.generate(input_ids=ids, **options, return_dict_in_generate=True, output_logits=True)
        zoo.close(output.logits[0], whole[:, -1], 2e-5)
        assert output.past_key_values.layers[0].keys.shape[0] == zoo.B
        outputs.append(whole)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)
    with tuned.disable_adapter():
        zoo.close(exact_logits_of(tuned, ids), expected, 1e-6)


# -- refused


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Qwen3Next", "carry a state that each stream would need"),
        ("FalconH1", "carry a state that each stream would need"),
        ("Bloom", "does not come from transformers' registry"),
        ("T5", "is an encoder with a decoder"),
        ("Bert", "attention layers that are not causal"),
        ("Mamba", "No attention was found"),
    ],
)
def test_models_that_cannot_share(name, reason, zoo):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 96}
    options = {
        "Bloom": {"n_head": 2, "n_layer": 2},
        "T5": {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 96},
        "Bert": {"num_attention_heads": 2, "intermediate_size": 32},
        "FalconH1": {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 32,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
        },
        "Mamba": {"state_size": 4},
    }
    if name == "Qwen3Next":
        model = zoo.FAMILIES["qwen3_next"].build("sdpa")
    else:
        suffix = {"T5": "ForConditionalGeneration", "Bert": "Model"}.get(name, "ForCausalLM")
        given = options[name] if name == "T5" else small | options[name]
        model = getattr(transformers, name + suffix)(getattr(transformers, f"{name}Config")(**given))
    names = set(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=reason):
        parscale.wrap(model, 2, prefix_length=3, init="random", kv="shared")
    assert set(model.state_dict()) == names
    assert not hasattr(model, "parscale")
    parscale.wrap(model, 1, kv="shared")  # one stream shares with nobody


def pad_with_nothing(model):
    """Token 0 is padding and embedded as zero; without biases, all that is computed from it is zero."""
    model.config.pad_token_id = 0
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()


@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_that_keeps_more_than_keys_is_found_out(llama, padded):
    """By a run with a cache and one without, which differ."""
    attention = llama.model.layers[0].self_attn
    if padded:
        pad_with_nothing(llama)
    own, seen = attention.forward, []

    def forward(hidden_states, *args, **kwargs):
        if kwargs.get("past_key_values", kwargs.get("cache")) is not None:  # 5.24 calls it `cache`
            seen.append(1)
            hidden_states = hidden_states * len(seen)
        return own(hidden_states, *args, **kwargs)

    attention.forward = forward
    with pytest.raises(UnsupportedModelError, match=r"something else with a cache than without \(\d+%\)"):
        parscale.wrap(llama, 2, prefix_length=3, init="random", kv="shared")


def test_a_layer_that_remembers_a_position_is_found_out(llama):
    """Its queries forget where they are once there is a cache; equal tokens would hide that, having equal values."""
    rotary = llama.model.rotary_emb
    own = rotary.forward
    rotary.forward = lambda x, position_ids: own(x, position_ids - position_ids[:, :1])
    with pytest.raises(UnsupportedModelError, match=r"something else with a cache than without \(\d+%\)"):
        parscale.wrap(llama, 2, kv="shared", transform="lora")


@pytest.mark.parametrize("transform", ["prefix", "lora"])
def test_padding_that_is_embedded_as_zero_in_float16(llama, transform, tmp_path, zoo):
    """Zero over zero is no reason to refuse a model."""
    pad_with_nothing(llama)
    model = zoo.share(llama.half(), transform=transform)
    model.save_pretrained(tmp_path)
    found = load(tmp_path).state_dict()
    assert all(torch.equal(found[name], x) for name, x in model.state_dict().items())


def test_a_report_of_each_stream(llama, zoo):
    """The first one's loss is the plain backbone's."""
    ids = zoo.token_ids()
    with torch.no_grad():
        alone = llama(ids, labels=ids).loss
    report = zoo.share(llama).stream_report(ids)
    assert report.losses.shape == (zoo.P,)
    zoo.close(report.losses[0], alone, 1e-5)
    assert (report.losses[1:] - alone).abs().min() > 1e-3
    assert report.weights.shape == (zoo.B, zoo.S, zoo.P)
