"""Models whose weights accelerate keeps on the CPU or on a disk while nothing runs: offloaded or wrapped first."""

import functools

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM

import parscale
from parscale.compat.accelerate import hook_of

TRANSFORMS = ["prefix", "prompt", "lora"]
CPU = torch.device("cpu")


def places(model):
    """The last layer's weights on the disk, all others on the CPU."""
    decoder = model.get_decoder()
    name = next(own for own, module in model.named_modules() if module is decoder)
    layers = next(own for own, child in decoder.named_children() if isinstance(child, torch.nn.ModuleList))
    found = {f"{name}.{own}": "cpu" for own, _ in decoder.named_children() if own != layers}
    found |= {f"{name}.{own}": "cpu" for own, _ in decoder.named_parameters(recurse=False)}
    found |= {f"{name}.{layers}.{i}": "cpu" for i in range(len(getattr(decoder, layers)))}
    found[f"{name}.{layers}.{len(getattr(decoder, layers)) - 1}"] = "disk"
    return found | {own: "cpu" for own, _ in model.named_children() if own != name}


OFFLOAD = {
    "to the CPU": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "to a disk": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "by a map": lambda model, folder: dispatch_model(
        model, places(model), offload_dir=folder, main_device="cpu", force_hooks=True
    ),
}


def bloom(zoo):
    """Reads its prefix outside of its attention's own forward pass."""
    config = transformers.BloomConfig(vocab_size=zoo.VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.BloomForCausalLM(config).eval()


@pytest.fixture(params=[pytest.param("llama", marks=pytest.mark.nightly), "gpt_oss", "bloom", "gemma3n"])
def plain(request, zoo, tmp_path):
    """Makes a model, the same at every call; GPT-OSS has parameters of its own in its attention layers."""
    own = {"bloom": functools.partial(bloom, zoo), "gemma3n": zoo.gemma3n}.get(request.param)
    make = own if own else zoo.Case(zoo.FAMILIES[request.param]).plain
    try:
        logits_of(OFFLOAD["by a map"](make(), tmp_path / "plain"), zoo)
    except KeyError:
        pytest.skip("transformers 5.16 does not hand keys on to an offloaded layer that borrows them")
    return make


def with_streams(model, transform, seed=0):
    parscale.wrap(model, 3, prefix_length=4, init="random", seed=seed, transform=transform)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("prefix_", "prompt", "stream_", "aggregate_layer")):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def logits_of(model, zoo):
    return model(zoo.token_ids()).logits


@pytest.mark.grid
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("how", OFFLOAD)
def test_offloaded_after_wrapping(how, transform, plain, zoo, tmp_path):
    """Same bits, in what it computes, in what it saves, and beside a set that is made afterwards."""
    model = with_streams(plain(), transform)
    expected, tensors = logits_of(model, zoo), {name: x.clone() for name, x in model.state_dict().items()}
    model = OFFLOAD[how](model, tmp_path / "weights")
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits_of(model, zoo), expected)
    model.save_streams(tmp_path / "streams")
    assert torch.equal(logits_of(parscale.load(tmp_path / "streams", backbone=plain()), zoo), expected)
    model.save_pretrained(tmp_path / "whole")
    saved = parscale.load(tmp_path / "whole").state_dict()
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())

    model.add_streams("two", 2, prefix_length=3, init="random", seed=1, transform=transform)
    model.set_streams("two")
    alone = parscale.wrap(plain(), 2, prefix_length=3, init="random", seed=1, transform=transform)
    assert torch.equal(logits_of(model, zoo), logits_of(alone, zoo))
    model.set_streams("default")
    assert torch.equal(logits_of(model, zoo), expected)


@pytest.mark.parametrize("how", OFFLOAD)
def test_a_further_set_is_saved_with_its_own_values(how, zoo, tmp_path):
    """Its released names are those of the default set's tensors, by which transformers fetches what is offloaded."""
    plain = zoo.Case(zoo.FAMILIES["llama"]).plain
    model = with_streams(plain(), "prefix")
    model.add_streams("two", 2, prefix_length=4, init="random", seed=1)
    model.set_streams("two")
    expected = {name: x.clone() for name, x in model.parscale.tensors(model.parscale.active).items()}
    OFFLOAD[how](model, tmp_path / "weights")
    model.save_pretrained(tmp_path / "whole")
    saved = parscale.load(tmp_path / "whole").parscale
    assert saved.active.name == "two"
    assert all(torch.equal(x, expected[name]) for name, x in saved.tensors(saved.active).items())


@pytest.mark.grid
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("how", OFFLOAD)
def test_wrapped_after_offloading(how, transform, plain, zoo, tmp_path):
    """The streams stay where they are, so that they can train."""
    model = with_streams(OFFLOAD[how](plain(), tmp_path / "weights"), transform)
    ordinary, ids = with_streams(plain(), transform), zoo.token_ids()
    assert torch.equal(logits_of(model, zoo), logits_of(ordinary, zoo))
    for each in (model, ordinary):
        each.freeze_backbone()
        each(ids, labels=ids).loss.backward()
    gradients = {name: parameter.grad for name, parameter in ordinary.named_parameters() if parameter.requires_grad}
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
    model.save_streams(tmp_path / "streams")
    assert torch.equal(logits_of(parscale.load(tmp_path / "streams", backbone=plain()), zoo), logits_of(ordinary, zoo))
    assert torch.equal(logits_of(parscale.unwrap(model), zoo), logits_of(plain(), zoo))


@pytest.mark.grid
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_loaded_by_a_map(transform, tiny, zoo, tmp_path):
    tiny().save_pretrained(tmp_path / "plain")
    options = {"device_map": places(tiny()), "offload_folder": tmp_path / "weights"}
    model = with_streams(AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **options), transform)
    zoo.close(logits_of(model, zoo), logits_of(with_streams(tiny(), transform), zoo), 0.0)


def test_unwrapping_gives_each_module_its_own_hook_back(zoo):
    model = cpu_offload(zoo.Case(zoo.FAMILIES["gpt_oss"]).plain(), execution_device=CPU)
    before = {name: hook_of(module) for name, module in model.named_modules()}
    parscale.unwrap(parscale.wrap(model, 3, prefix_length=4, init="random"))
    assert {name: hook_of(module) for name, module in model.named_modules()} == before
