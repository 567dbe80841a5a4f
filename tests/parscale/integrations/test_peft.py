"""PEFT on a wrapped model: adapters on the backbone, streams that stay as trainable as they were."""

import pytest
import torch
import transformers
from lora_adapters import train
from model_calls import logits_of
from packaging.version import Version
from peft_versions import peft_for_add_adapter
from torch import nn

import parscale
from parscale import UnsupportedModelError

peft = pytest.importorskip("peft")

FEW = pytest.mark.parametrize(
    "family", ["llama", "gemma3", "gpt2", "gpt_neox", "qwen3_moe", "deepseek_v3"], indirect=True
)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# Mixtures of experts whose modules PEFT renames. Before 0.20 it takes "all-linear" for a set of letters there.
RENAMED = ("qwen3_moe", "deepseek_v3")
TAKES_LETTERS = Version(peft.__version__) < Version("0.20")


def is_stream(name):
    return "prefix_" in name or "aggregate_layer" in name


def is_adapter(name):
    return "lora_" in name


def adapted(model, **changes):
    if TAKES_LETTERS and getattr(getattr(model, "config", None), "model_type", "") in RENAMED:
        linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        attention = {name.rpartition(".")[2] for name in linear if ".self_attn." in name}
        changes = {"target_modules": sorted(attention)} | changes
    return peft.get_peft_model(model, peft.LoraConfig(**LORA | changes))


@pytest.mark.parametrize("name", RENAMED)
def test_all_linear_on_a_mixture_of_experts_without_streams(name, zoo):
    """PEFT alone, which says where the tests below name the modules."""
    model, config = zoo.FAMILIES[name].build(), peft.LoraConfig(**LORA)
    if TAKES_LETTERS:
        with pytest.raises(ValueError, match=r"Target modules .*'-'"):
            peft.get_peft_model(model, config)
    else:
        tuned = peft.get_peft_model(model, config)
        assert any(is_adapter(parameter) and "experts" in parameter for parameter, _ in tuned.named_parameters())


@FEW
def test_adapters_on_the_backbone_streams_beside_them(family, zoo):
    model, ids = family.wrapped(), zoo.token_ids()
    expected = logits_of(model, ids)
    tuned = adapted(model)
    names = [name for name, _ in tuned.named_parameters()]
    assert not any("aggregate_layer" in name and is_adapter(name) for name in names)
    assert any(is_adapter(name) for name in names)
    assert any(is_stream(name) for name in names)
    for name, parameter in tuned.named_parameters():
        assert parameter.requires_grad is (is_adapter(name) or is_stream(name)), name
    zoo.close(logits_of(tuned.eval(), ids), expected, 1e-6)  # a fresh adapter does nothing


@FEW
def test_a_training_step_moves_adapters_and_streams_only(family, zoo):
    model, ids = adapted(family.wrapped()).train(), zoo.token_ids()
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for name, tensor in model.named_parameters():
        moved = not torch.equal(tensor, before[name])
        if "lora_A" in name:  # which get a gradient once lora_B is not zero
            continue
        assert moved is (is_stream(name) or is_adapter(name)), name


@FEW
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_under_an_adapter(family, zoo, reentrant):
    ids, found = zoo.token_ids(), []
    for checkpointing in (False, True):
        torch.manual_seed(0)  # of the adapter
        model = adapted(family.wrapped()).train()
        for name, tensor in model.named_parameters():
            if "lora_B" in name:
                tensor.data.normal_(0, 0.1)
        if checkpointing:
            enable = getattr(model.base_model.model, "activation_checkpointing_enable", None)
            (enable or model.base_model.model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any(is_stream(name) for name in found[0])
    assert any(is_adapter(name) for name in found[0])
    for name, gradient in found[0].items():
        zoo.close(found[1][name], gradient, 5e-6 * max(1.0, gradient.abs().max().item()))


@FEW
def test_inactive_sets_stay_frozen(family, zoo):
    model = family.wrapped()
    model.add_streams("more", 2, prefix_length=3, init="random")
    tuned = adapted(model)
    for name, parameter in tuned.named_parameters():
        assert parameter.requires_grad is ((is_adapter(name) or is_stream(name)) and "@more" not in name), name
    model.set_streams("more")
    for name, parameter in tuned.named_parameters():
        assert parameter.requires_grad is (is_adapter(name) or (is_stream(name) and "@more" in name)), name


@FEW
def test_members_are_reached_through_the_adapter(family, zoo, capsys):
    model, ids = family.wrapped(), zoo.token_ids()
    plain = logits_of(family.plain(), ids)
    tuned = adapted(model).eval()
    assert tuned.num_streams == zoo.P
    with tuned.use_streams(None):
        zoo.close(logits_of(tuned, ids), plain, 1e-6)
        assert tuned.num_streams == 1
    assert tuned.stream_report(ids).weights.shape == (zoo.B, zoo.S, zoo.P)
    assert {*tuned.stream_parameters()} == {tensor for name, tensor in tuned.named_parameters() if is_stream(name)}
    model.print_trainable_parameters()
    line = capsys.readouterr().out
    trained = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    streams = sum(parameter.numel() for name, parameter in tuned.named_parameters() if is_stream(name))
    assert f"trainable params: {trained:,} " in line
    assert f"others: {trained - streams:,})" in line  # the adapter's


@FEW
def test_merging_and_removing_the_adapter(family, zoo):
    model, ids = family.wrapped(), zoo.token_ids()
    before = logits_of(model, ids)
    torch.manual_seed(0)
    tuned = adapted(model).eval()
    for name, tensor in tuned.named_parameters():
        if "lora_B" in name:
            tensor.data.normal_(0, 0.1)
    expected = logits_of(tuned, ids)
    assert (expected - before).abs().max() > 1e-3
    with tuned.disable_adapter():
        zoo.close(logits_of(tuned, ids), before, 1e-6)
    merged = tuned.merge_and_unload()
    assert merged is model
    assert merged.num_streams == zoo.P
    zoo.close(logits_of(merged, ids), expected, 5e-5)  # weights of size 1 are rounded once more


@pytest.mark.parametrize("by_place", [False, True])
def test_merging_one_adapter_of_several_keeps_its_streams(zoo, by_place):
    tuned, ids = adapted(with_streams(zoo, "prefix")).eval(), zoo.token_ids()
    tuned.add_adapter("other", peft.LoraConfig(**LORA))
    tuned.set_adapter("other")
    train(tuned, by=0.01)
    expected = logits_of(tuned, ids)
    tuned.set_adapter("default")
    assert (logits_of(tuned, ids) - expected).abs().max() > 1e-2
    arguments = ([False, False, ["other"]], {}) if by_place else ([], {"adapter_names": ["other"]})
    zoo.close(logits_of(tuned.merge_and_unload(*arguments[0], **arguments[1]), ids), expected, 1e-4)


def test_models_that_are_not_wrapped_are_as_before(zoo):
    parscale.wrap(zoo.FAMILIES["llama"].build(), 2, prefix_length=3, init="random")  # the hook into PEFT is in place
    tuned = adapted(zoo.FAMILIES["llama"].build())
    assert all(parameter.requires_grad is is_adapter(name) for name, parameter in tuned.named_parameters())
    sequential = adapted(nn.Sequential(nn.Linear(2, 2)), target_modules=["0"], task_type=None)
    assert all(parameter.requires_grad is is_adapter(name) for name, parameter in sequential.named_parameters())
    unwrapped = parscale.wrap(zoo.FAMILIES["llama"].build(), 2, prefix_length=3, init="random")
    tuned = adapted(parscale.unwrap(unwrapped))
    assert all(parameter.requires_grad is is_adapter(name) for name, parameter in tuned.named_parameters())


def test_the_other_order_is_refused(zoo):
    tuned = adapted(zoo.FAMILIES["llama"].build())
    trains = [parameter.requires_grad for parameter in tuned.parameters()]
    with pytest.raises(UnsupportedModelError, match=r"got PeftModelForCausalLM.*wrap before get_peft_model"):
        parscale.wrap(tuned, 2)
    assert [parameter.requires_grad for parameter in tuned.parameters()] == trains


@pytest.mark.parametrize("trained_before", [True, False])
def test_streams_that_were_frozen_on_purpose_stay_frozen(zoo, trained_before):
    model = parscale.wrap(zoo.FAMILIES["llama"].build(), 2, prefix_length=3, init="random")
    for name, parameter in model.named_parameters():
        if is_stream(name):
            parameter.requires_grad_(trained_before)
    tuned = adapted(model)
    assert all(p.requires_grad is trained_before for name, p in tuned.named_parameters() if is_stream(name))


def test_adapters_saved_and_loaded_hold_no_streams(zoo, tmp_path):
    case, ids = zoo.Case(zoo.FAMILIES["llama"], "sdpa"), zoo.token_ids()
    torch.manual_seed(0)
    tuned = adapted(case.wrapped()).eval()
    for name, tensor in tuned.named_parameters():
        if "lora_B" in name:
            tensor.data.normal_(0, 0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert not any(is_stream(name) for name in file.keys())  # noqa: SIM118
    again = peft.PeftModel.from_pretrained(case.wrapped(), tmp_path / "adapter", is_trainable=True).eval()
    zoo.close(logits_of(again, ids), logits_of(tuned, ids), 1e-6)
    assert all(p.requires_grad is (is_adapter(n) or is_stream(n)) for n, p in again.named_parameters())


def test_an_adapter_in_a_subfolder_brings_its_streams(zoo, tmp_path):
    tuned, ids = adapted(with_streams(zoo, "prefix")).eval(), zoo.token_ids()
    train(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(with_streams(zoo, "prefix"), tmp_path, subfolder="adapter").eval()
    assert torch.equal(logits_of(again, ids), logits_of(tuned, ids))


@pytest.mark.parametrize("changes", [{"init": "documents"}, {"seed": 1}])
def test_how_streams_began_is_not_compared(changes, tiny, zoo, tmp_path):
    """The folder has their values."""

    def made(**changes):
        return parscale.wrap(tiny(), 2, **{"prefix_length": 3, "init": "random", "seed": 0} | changes)

    tuned, ids = adapted(made()).eval(), zoo.token_ids()
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(made(**changes), tmp_path).eval()
    assert torch.equal(logits_of(again, ids), logits_of(tuned, ids))


def test_a_rank_that_streams_do_not_have_is_not_compared(tiny, tmp_path):
    """Only low-rank differences have one, and only their folders hold it."""

    def made(rank):
        return parscale.wrap(tiny(), 2, prefix_length=3, init="random", seed=0, rank=rank)

    tuned = adapted(made(4)).eval()
    tuned.save_pretrained(tmp_path)
    for rank in (4, 2):
        again = peft.PeftModel.from_pretrained(made(rank), tmp_path).eval()
        ids = torch.arange(9)[None] + 3
        assert torch.equal(logits_of(again, ids), logits_of(tuned, ids))


def test_low_rank_streams_for_those_that_started_from_texts_are_refused(tiny, tmp_path):
    adapted(parscale.wrap(tiny(), 2, transform="lora")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds streams .*transform='lora'.* that differ from this model's "):
        peft.PeftModel.from_pretrained(parscale.wrap(tiny(), 2, prefix_length=3), tmp_path)


def test_without_its_adapter_nothing_trains_until_the_next(zoo):
    """What runs then are the copies from before the first adapter, which no optimizer sees."""
    model = parscale.wrap(zoo.FAMILIES["llama"].build(), 2, prefix_length=zoo.T, init="random", seed=0)
    tuned, ids = adapted(model), zoo.token_ids()
    tuned.delete_adapter("default")
    assert not model(input_ids=ids, labels=ids).loss.requires_grad
    tuned.add_adapter("next", peft.LoraConfig(**LORA))
    tuned.set_adapter("next")
    assert any(p.requires_grad for name, p in tuned.named_parameters() if is_stream(name))


def with_streams(zoo, transform, kv="own"):
    init = {"rank": 2} if transform == "lora" else {"prefix_length": 3, "init": "random"}
    model = parscale.wrap(zoo.FAMILIES["llama"].build("sdpa"), 2, transform=transform, kv=kv, seed=0, **init)
    zoo.fill_streams(model)
    return model


@pytest.mark.parametrize(
    ("transform", "kv", "entry"),
    [
        ("lora", "own", "down_proj"),
        ("prefix", "own", "self_attn"),
        ("prefix", "own", "layers.1"),  # which holds what holds them
        ("prefix", "shared", "k_proj"),  # sees the rows of stream 0 alone
        ("prompt", "own", "self_attn"),  # a copy of it would bring one of the model
    ],
)
def test_copies_of_modules_with_streams_are_refused(zoo, transform, kv, entry):
    model = with_streams(zoo, transform, kv)
    names = [name for name, _ in model.named_modules()]
    changes = {"target_modules": ["gate_proj"], "modules_to_save": ["lm_head", entry]}
    said = rf"modules_to_save with '{entry}': PEFT would train a copy of model\.layers\.\d.* Omit it, or name it in"
    with pytest.raises(ValueError, match=said):
        adapted(model, **changes)
    assert [name for name, _ in model.named_modules()] == names
    assert model.parscale.adapters is None
    tuned = adapted(model, target_modules=["gate_proj"])
    with pytest.raises(ValueError, match=said):
        tuned.add_adapter("other", peft.LoraConfig(**LORA | changes))


def test_copies_are_refused_by_the_models_own_method_too(zoo):
    peft_for_add_adapter(zoo.FAMILIES["llama"].build())
    model = with_streams(zoo, "prefix", "own")
    with pytest.raises(ValueError, match="modules_to_save with 'self_attn': PEFT would train a copy of model"):
        model.add_adapter(peft.LoraConfig(**LORA | {"target_modules": ["gate_proj"], "modules_to_save": ["self_attn"]}))


def test_a_copy_of_a_pooler_that_mixes_streams_is_refused():
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = parscale.wrap(transformers.BertForSequenceClassification(config), 2, prefix_length=3, init="random")
    changes = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    with pytest.raises(ValueError, match=r"a copy of bert\.pooler in its place, without the streams"):
        adapted(model, **changes, modules_to_save=["pooler"])
    assert adapted(model, **changes).num_streams == 2  # PEFT saves the classifier


def test_low_rank_streams_on_a_copy_are_refused(zoo):
    tuned = adapted(with_streams(zoo, "prefix"), target_modules=["q_proj"], modules_to_save=["down_proj"])
    with pytest.raises(ValueError, match="modules_to_save with 'down_proj'"):
        tuned.add_streams("low", 2, transform="lora", rank=2)
    assert list(tuned.parscale.sets) == ["default"]


@pytest.mark.parametrize("transform", ["prefix", "prompt", "lora"])
def test_modules_without_streams_can_be_saved(zoo, transform, tmp_path):
    model, ids = with_streams(zoo, transform), zoo.token_ids()
    expected = logits_of(model, ids)
    tuned = adapted(model, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm"])
    zoo.close(logits_of(tuned.eval(), ids), expected, 1e-6)
    tuned(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parscale.tensors(model.parscale.active).values())
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(with_streams(zoo, transform), tmp_path).eval()
    zoo.close(logits_of(again, ids), expected, 1e-6)


def test_an_adapter_loaded_for_inference_trains_no_streams(zoo, tmp_path):
    adapted(with_streams(zoo, "prefix"), target_modules=["q_proj"]).save_pretrained(tmp_path)
    model = with_streams(zoo, "prefix")
    model.add_streams("more", 2, prefix_length=3, init="random")
    tuned = peft.PeftModel.from_pretrained(model, tmp_path)

    def trained():
        return {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}

    assert not trained()
    tuned.load_adapter(tmp_path, "other")
    assert not trained()
    tuned.set_adapter("default")
    trains = trained()
    assert all((is_stream(name) and "@" not in name) or "lora_" in name for name in trains)
    assert sum(map(is_stream, trains)) == len(model.parscale.tensors(model.parscale.active))
    tuned.set_adapter("other", inference_mode=True)
    assert not trained()
    tuned.delete_adapter("default")
    assert not trained()
    model.set_streams("more")
    tuned.set_adapter("other")
    streams = model.parscale.tensors(model.parscale.sets["more"]).values()
    assert all(tensor.requires_grad for tensor in streams)
    assert sum(map(is_stream, trained())) == len(streams)


def test_a_further_adapter_beside_one_for_inference_trains_no_streams(zoo, tmp_path):
    """As long as it is not the one in use."""
    adapted(with_streams(zoo, "prefix"), target_modules=["q_proj"]).save_pretrained(tmp_path)
    tuned = peft.PeftModel.from_pretrained(with_streams(zoo, "prefix"), tmp_path)
    tuned.add_adapter("further", peft.LoraConfig(**LORA | {"target_modules": ["q_proj"]}))
    assert not any(parameter.requires_grad for name, parameter in tuned.named_parameters() if is_stream(name))
    tuned.set_adapter("further")
    assert any(parameter.requires_grad for name, parameter in tuned.named_parameters() if is_stream(name))
