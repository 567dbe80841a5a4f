"""Streams belong to adapters: they are switched, saved, loaded, merged and removed with them."""

import copy

import pytest
import torch
from lora_adapters import adapted, is_stream, lora, train
from model_calls import logits_of
from peft_versions import peft_for_add_adapter
from safetensors import safe_open
from transformers import Trainer, TrainingArguments

import parscale

peft = pytest.importorskip("peft")


def streams_of(model):
    """The values in use, by their released names."""
    state = model.parscale
    return {name: tensor.detach().clone() for name, tensor in state.tensors(state.active).items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(params=["prefix", "prompt", "lora"])
def transform(request):
    return request.param


@pytest.fixture
def make(zoo):
    """A function that makes the same wrapped model each time."""

    def make(transform="prefix", num_streams=3, **changes):
        model = zoo.FAMILIES["llama"].build("sdpa", **changes)
        init = {} if transform == "lora" else {"init": "random", "prefix_length": 4}
        parscale.wrap(model, num_streams, transform=transform, seed=0, **init)
        train(model.model.aggregate_layer)
        return model

    return make


def test_switched_off_is_the_model_before_the_adapter(make, zoo, transform):
    model, ids = make(transform), zoo.token_ids()
    before = logits_of(model, ids)
    tuned = adapted(model)
    train(tuned)
    on = logits_of(tuned, ids)
    assert (on - before).abs().max() > 1e-3
    with tuned.disable_adapter():
        with tuned.disable_adapter():
            assert torch.equal(logits_of(tuned, ids), before)
        assert torch.equal(logits_of(tuned, ids), before)
    assert torch.equal(logits_of(tuned, ids), on)
    with pytest.raises(RuntimeError, match="inside"), tuned.disable_adapter():
        raise RuntimeError("inside")
    assert torch.equal(logits_of(tuned, ids), on)
    tuned.base_model.disable_adapter_layers()
    assert torch.equal(logits_of(tuned, ids), before)
    tuned.base_model.enable_adapter_layers()
    assert torch.equal(logits_of(tuned, ids), on)


def test_switched_off_in_between_takes_no_gradient_away(make, zoo):
    ids, found = zoo.token_ids(), []
    for switch in (False, True):
        for checkpointing in (False, True):
            tuned = adapted(make()).train()
            if checkpointing:
                model = tuned.get_base_model()
                enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
                enable({"use_reentrant": False})
            loss = tuned(input_ids=ids, labels=ids, use_cache=False).loss
            if switch:
                with tuned.disable_adapter():
                    logits_of(tuned, ids)
            loss.backward()
            found.append({name: p.grad for name, p in tuned.named_parameters() if p.grad is not None})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in found[0].items():
            zoo.close(other[name], gradient, 1e-5 * max(1.0, gradient.abs().max().item()))


def test_each_adapter_has_streams_of_its_own(make, zoo, transform):
    model, ids = make(transform), zoo.token_ids()
    before = logits_of(model, ids)
    tuned = adapted(model)
    tuned.add_adapter("other", lora())
    tuned.set_adapter("other")
    trained = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert any(map(is_stream, trained))
    assert not any(".default." in name for name in trained)
    train(tuned)
    other = logits_of(tuned, ids)
    tuned.set_adapter("default")
    zoo.close(logits_of(tuned, ids), before, 1e-6)  # as new
    train(tuned, by=-0.1)
    default = logits_of(tuned, ids)
    for name, expected in (("other", other), ("default", default), ("other", other)):
        tuned.set_adapter(name)
        assert torch.equal(logits_of(tuned, ids), expected)
        with tuned.disable_adapter():
            assert torch.equal(logits_of(tuned, ids), before)
    tuned.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for name, p in tuned.named_parameters() if is_stream(name))
    copied = copy.deepcopy(tuned)
    tuned.delete_adapter("default")
    assert tuned.active_adapters == ["other"]
    assert torch.equal(logits_of(tuned, ids), other)
    tuned.delete_adapter("other")
    assert torch.equal(logits_of(model, ids), before)  # a PeftModel of no adapter does not run
    assert torch.equal(logits_of(copied, ids), default)
    copied.set_adapter("other")
    assert torch.equal(logits_of(copied, ids), other)


def test_a_further_adapter_starts_with_the_streams_in_use(make):
    tuned = adapted(make())
    train(tuned)
    now = streams_of(tuned)
    tuned.add_adapter("ref", lora())
    train(tuned)
    assert not equal(streams_of(tuned), now)
    tuned.set_adapter("ref")
    assert equal(streams_of(tuned), now)


@pytest.mark.parametrize("active", ["default", "other"])
def test_removing_all_adapters_at_once(make, zoo, active, transform):
    ids = zoo.token_ids()
    names = {name for name, _ in make(transform).named_parameters()}
    before = logits_of(make(transform), ids)
    for merge in (False, True):
        model = make(transform)
        tuned = adapted(model)
        tuned.add_adapter("other", lora())
        tuned.set_adapter(active)
        train(tuned, by=0.01)
        expected = logits_of(tuned, ids) if merge else before
        plain = tuned.merge_and_unload() if merge else tuned.unload()
        assert plain is model
        zoo.close(logits_of(plain, ids), expected, 1e-4)
        assert {name for name, _ in plain.named_parameters()} == names
        assert not any("@@" in name for name, _ in [*plain.named_buffers(), *plain.named_modules()])
        assert all(p.requires_grad for name, p in plain.named_parameters() if is_stream(name))
        again = adapted(plain)
        train(again)
        with again.disable_adapter():
            zoo.close(logits_of(again, ids), expected, 1e-4)


def test_sets_that_were_there_before_and_that_come_later(make, zoo):
    model, ids = make(), zoo.token_ids()
    model.add_streams("more", 2, prefix_length=3, init="random", seed=1)
    with model.use_streams("more"):
        more = logits_of(model, ids)
    tuned = adapted(model)
    model.add_streams("late", 2, prefix_length=3, init="random", seed=2)
    with model.use_streams("late"):
        late = logits_of(tuned, ids)
    for name, before in (("more", more), ("late", late)):
        model.set_streams(name)
        train(tuned)
        assert (logits_of(tuned, ids) - before).abs().max() > 1e-3
        with tuned.disable_adapter():
            assert torch.equal(logits_of(tuned, ids), before)


def test_choosing_a_set_while_adapters_are_switched_off(make, zoo):
    model, ids = make(), zoo.token_ids()
    model.add_streams("more", 2, prefix_length=3, init="random", seed=1)
    with model.use_streams("more"):
        more = logits_of(model, ids)
    tuned = adapted(model)
    train(tuned)
    trains = {name: p.requires_grad for name, p in tuned.named_parameters()}
    with tuned.disable_adapter(), model.use_streams("more"):
        assert torch.equal(logits_of(tuned, ids), more)
    assert {name: p.requires_grad for name, p in tuned.named_parameters()} == trains
    with tuned.disable_adapter():
        model.set_streams("more")
        assert torch.equal(logits_of(tuned, ids), more)
        weights = model.stream_report(ids).weights
    assert all(p.requires_grad is ("@more" in name) for name, p in tuned.named_parameters() if is_stream(name))
    assert not any(buffer.requires_grad for buffer in tuned.buffers())
    train(tuned)
    with torch.no_grad():
        model.parscale.aggregator(model.parscale.active)[2].weight.normal_()
    with tuned.disable_adapter():
        assert torch.equal(logits_of(tuned, ids), more)
        assert torch.equal(model.stream_report(ids).weights, weights)
    assert not torch.equal(model.stream_report(ids).weights, weights)


@pytest.mark.parametrize("chosen", ["more", None])
def test_an_adapter_trains_the_streams_of_the_set_in_use(chosen, make, zoo):
    """Also where another set was in use when it was added."""
    model, ids = make(), zoo.token_ids()
    model.add_streams("more", 2, prefix_length=3, init="random", seed=1)
    tuned = adapted(model)
    tuned.add_adapter("second", lora())
    tuned.set_streams(chosen)
    for adapter in ("second", "default", "second"):
        tuned.set_adapter(adapter)
        tensors, sets = model.parscale.tensors, model.parscale.sets
        trained = {name for name, own in sets.items() if any(p.requires_grad for p in tensors(own).values())}
        assert trained == ({chosen} if chosen else set())
    tuned(input_ids=ids, labels=ids).loss.backward()
    assert chosen is None or all(p.grad is not None for p in tensors(sets[chosen]).values())


def test_unwrapping_leaves_nothing_behind(make, zoo):
    model = make()
    tuned = adapted(model)
    tuned.add_adapter("other", lora())
    parscale.unwrap(model)
    assert not any(is_stream(name) for name, _ in [*tuned.named_parameters(), *tuned.named_buffers()])
    assert torch.isfinite(logits_of(tuned, zoo.token_ids())).all()


# -- saved and loaded


def test_each_adapter_is_saved_with_its_streams(make, zoo, tmp_path):
    ids, tuned, expected = zoo.token_ids(), adapted(make()), {}
    tuned.add_adapter("other", lora())
    for name, by in (("default", 0.1), ("other", -0.1)):
        tuned.set_adapter(name)
        train(tuned, by)
        expected[name] = logits_of(tuned, ids)
    tuned.set_adapter("default")
    tuned.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "other"):
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            assert not any(map(is_stream, file.keys()))
    again = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    again.load_adapter(tmp_path / "other", "other")
    for name in ("other", "default"):
        again.set_adapter(name)
        assert torch.equal(logits_of(again, ids), expected[name])
    loaded = parscale.load(tmp_path / "other", backbone=zoo.FAMILIES["llama"].build("sdpa"))
    tuned.set_adapter("other")
    assert equal(streams_of(loaded), streams_of(tuned))


def test_biases_that_an_adapter_takes_are_the_backbones(make, zoo, tmp_path):
    tuned = adapted(make(), bias="all")
    train(tuned)
    tuned.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert any(name.endswith("q_proj.base_layer.bias") for name in file.keys())  # noqa: SIM118
        assert not any(map(is_stream, file.keys()))
    again = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert torch.equal(logits_of(again, zoo.token_ids()), logits_of(tuned, zoo.token_ids()))


def test_only_the_chosen_adapters_are_saved(make, tmp_path):
    tuned = adapted(make())
    tuned.add_adapter("other", lora())
    tuned.save_pretrained(tmp_path, selected_adapters=["other"])
    assert not (tmp_path / "streams.safetensors").exists()
    assert (tmp_path / "other" / "streams.safetensors").exists()


def test_an_adapter_without_streams_leaves_them_as_they_are(make, zoo, tmp_path):
    plain = adapted(zoo.FAMILIES["llama"].build("sdpa"))
    train(plain)
    plain.save_pretrained(tmp_path)
    model = make()
    before = streams_of(model)
    assert equal(streams_of(peft.PeftModel.from_pretrained(model, tmp_path)), before)


@pytest.mark.parametrize("changes", [{"num_streams": 2}, {"transform": "lora"}])
def test_streams_of_other_numbers_are_refused(make, tmp_path, changes):
    adapted(make()).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds streams .*num_streams=3.* that differ from this model's .*wrap the model"
    ):
        peft.PeftModel.from_pretrained(make(**changes), tmp_path)


def test_low_cpu_mem_usage(make, zoo, tmp_path):
    ids, tuned = zoo.token_ids(), adapted(make())
    train(tuned)
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=True).eval()
    again.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    for name in ("default", "other"):
        again.set_adapter(name)
        assert torch.equal(logits_of(again, ids), logits_of(tuned, ids))


def test_an_adapter_as_a_dictionary_of_tensors(make, zoo, transform):
    """What accelerate saves and loads of a model with adapters under FSDP, and some of TRL's teachers."""
    from accelerate.utils import fsdp_utils

    ids, tuned = zoo.token_ids(), adapted(make(transform))
    tuned.add_adapter("other", lora())
    tuned.set_adapter("other")
    train(tuned)
    expected = logits_of(tuned, ids)
    tensors = {
        name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(tuned, adapter_name="other").items()
    }
    assert not any("@@" in name for name in tensors)
    again = adapted(make(transform))
    before = logits_of(again, ids)
    again.add_adapter("third", lora())
    peft.set_peft_model_state_dict(again, tensors, adapter_name="third")
    zoo.close(logits_of(again, ids), before, 1e-6)
    again.set_adapter("third")
    assert torch.equal(logits_of(again, ids), expected)
    found = fsdp_utils._get_model_state_dict(again, adapter_only=True)
    assert equal(found, tensors)
    fsdp_utils._set_model_state_dict(again, {name: tensor + 1 for name, tensor in found.items()}, adapter_only=True)
    moved = streams_of(again)
    assert all(torch.equal(moved[name], tensors[f"base_model.model.{name}"] + 1) for name in moved)


def test_an_adapter_that_takes_the_place_of_another(make, zoo, tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    ids, tuned = zoo.token_ids(), adapted(make())
    train(tuned)
    tuned.save_pretrained(tmp_path)
    again = adapted(make())
    hotswap_adapter(again, str(tmp_path), adapter_name="default")
    assert torch.equal(logits_of(again, ids), logits_of(tuned, ids))


def test_a_mixture_of_adapters_has_streams_of_its_own(make):
    tuned = adapted(make())
    tuned.add_adapter("other", lora())
    tuned.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="linear")
    before = streams_of(tuned)
    tuned.set_adapter("both")
    assert equal(streams_of(tuned), before)
    train(tuned)
    tuned.set_adapter("default")
    assert equal(streams_of(tuned), before)


def test_a_model_without_streams_says_what_it_leaves_out(make, zoo, tmp_path):
    adapted(make()).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"holds streams for its adapter.*parscale\.load\(folder, backbone="):
        peft.PeftModel.from_pretrained(zoo.FAMILIES["llama"].build("sdpa"), tmp_path)


def trained(model, folder, steps, resume=None, **changes):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 96, (32, 12)).tolist()]
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_steps=2,
        max_steps=steps,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        **changes,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_resumed_run_is_the_run_that_would_have_been(make, tmp_path):
    results = []
    for folder, stops in (("whole", [4]), ("parts", [2, 4])):
        for steps in stops:
            torch.manual_seed(0)
            tuned = adapted(make())
            torch.manual_seed(0)
            trained(tuned, tmp_path / folder, steps, resume=None if steps == stops[0] else True)
        results.append({name: tensor.detach() for name, tensor in tuned.named_parameters()})
    assert equal(*results)
    assert not equal(streams_of(tuned), streams_of(make()))


def test_the_best_model_at_the_end_has_its_streams(make, tmp_path):
    tuned = adapted(make())
    trainer = trained(
        tuned,
        tmp_path,
        4,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="loss",
    )
    best = parscale.load(trainer.state.best_model_checkpoint, backbone=make().__class__(make().config))
    assert equal(streams_of(best), streams_of(tuned))


# -- trainable or not


def test_preparing_for_training_in_few_bits_leaves_streams_trainable(make):
    wrapped = make()
    from peft.utils.other import prepare_model_for_kbit_training  # extended by the first wrap of a process

    assert prepare_model_for_kbit_training(wrapped).model.aggregate_layer[0].weight.requires_grad
    model = peft.prepare_model_for_kbit_training(make())
    assert all(p.requires_grad is is_stream(name) for name, p in model.named_parameters())
    tuned = adapted(model)
    assert all(p.requires_grad is (is_stream(n) or "lora_" in n) for n, p in tuned.named_parameters())


def test_adapters_that_transformers_adds_leave_streams_trainable(make, tiny):
    peft_for_add_adapter(tiny())
    model = make()
    model.add_adapter(lora())
    assert all(p.requires_grad is (is_stream(n) or "lora_" in n) for n, p in model.named_parameters())


def test_mixed_kinds_of_adapters(make, zoo):
    model, ids = make(), zoo.token_ids()
    before = logits_of(model, ids)
    tuned = peft.get_peft_model(model, lora(task_type=None), mixed=True).eval()
    tuned.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["v_proj"]))
    tuned.set_adapter(["default", "other"])
    assert all(p.requires_grad for n, p in tuned.named_parameters() if is_stream(n) and "@@" not in n)
    train(tuned)
    on = logits_of(tuned, ids)
    with tuned.disable_adapter():
        assert torch.equal(logits_of(tuned, ids), before)
    assert torch.equal(logits_of(tuned, ids), on)


def test_what_fails_leaves_streams_trainable(make):
    model = make()
    with pytest.raises(ValueError, match="nowhere"):
        adapted(model, target_modules=["nowhere"])
    assert all(p.requires_grad for name, p in model.named_parameters() if is_stream(name))
    assert model.parscale.adapters is None


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_the_aggregator_is_no_target(make, field):
    with pytest.raises(ValueError, match=rf"{field} with 'aggregate_layer'.*Omit it"):
        adapted(make(), **{field: ["q_proj", "aggregate_layer"]})


def test_what_some_streams_cannot_have(make):
    with pytest.raises(ValueError, match="use_dora=True with transform='lora'"):
        adapted(make("lora"), use_dora=True)
    with pytest.raises(ValueError, match="PREFIX_TUNING with transform='prompt'"):
        peft.get_peft_model(make("prompt"), peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="layer_replication"):
        adapted(make(), layer_replication=[[0, 2], [1, 2]])
    model = make()
    tuned = adapted(model, use_dora=True)
    names = [name for name, _ in tuned.named_parameters()]
    with pytest.raises(ValueError, match="use_dora=True with transform='lora'"):
        model.add_streams("low-rank", 2, transform="lora")
    assert [name for name, _ in tuned.named_parameters()] == names


@pytest.mark.parametrize("how", ["PeftModel", "add_adapter"])
def test_low_rank_streams_made_after_an_adapter_stand_on_the_backbone(make, zoo, tmp_path, how):
    """Not on the adapter's own matrices, which go when it is merged."""
    model, ids = make(), zoo.token_ids()
    if how == "PeftModel":
        adapter = peft.get_peft_model(model, lora(init_lora_weights=False))
    else:
        peft_for_add_adapter(zoo.FAMILIES["llama"].build())
        model.add_adapter(lora(init_lora_weights=False))
    model.add_streams("low", 2, transform="lora", rank=2, seed=0)
    model.set_streams("low")
    names = list(model.parscale.tensors(model.parscale.active))
    assert not any("lora_" in name or "base_layer" in name for name in names)
    plain = make()
    plain.add_streams("low", 2, transform="lora", rank=2, seed=0)
    plain.set_streams("low")
    assert names == list(plain.parscale.tensors(plain.parscale.active))
    with torch.no_grad():
        for name, tensor in model.parscale.tensors(model.parscale.active).items():
            if name.endswith("stream_up"):
                tensor.normal_(0, 0.1)
    model.save_streams(tmp_path / "streams")
    assert parscale.load(tmp_path / "streams", backbone=zoo.FAMILIES["llama"].build("sdpa")).num_streams == 2
    if how == "PeftModel":
        expected = logits_of(model, ids)
        merged = adapter.merge_and_unload()
        zoo.close(logits_of(merged, ids), expected, 2e-5)
        merged.save_pretrained(tmp_path / "merged")
        zoo.close(logits_of(parscale.load(tmp_path / "merged"), ids), expected, 2e-5)
