"""Private names of torch do what is assumed of them."""

import pytest
import torch
from torch import nn

import parscale
from parscale.compat import torch as compat
from parscale.errors import IncompatibleVersionError
from parscale.kernels import compat as kernels


def test_a_parameter_is_set_past_whoever_replaces_its_registration(monkeypatch):
    """PEFT's and accelerate's loading on the meta device put another method in its place."""
    module, parameter = nn.Linear(2, 2), nn.Parameter(torch.ones(3))
    monkeypatch.setattr(nn.Module, "register_parameter", lambda self, name, value: None)
    compat.set_parameter(module, "extra", parameter)
    assert module.extra is parameter
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias", "extra"]


def test_buffers_are_put_back_with_those_that_are_none():
    module = nn.Linear(2, 2)
    module.register_buffer("filled", torch.ones(1))
    module.register_buffer("empty", None)
    held = compat.held_buffers(module)
    before = dict(held)
    module.empty = torch.zeros(1)
    module.register_buffer("new", torch.zeros(1))
    held.clear()
    held.update(before)
    assert module.empty is None
    assert [name for name, _ in module.named_buffers()] == ["filled"]


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_of_a_module_are_seen(register):
    module = nn.Linear(2, 2)
    assert not compat.has_hooks(module)
    hook = getattr(module, register)(lambda *args: None)
    assert compat.has_hooks(module)
    hook.remove()
    assert not compat.has_hooks(module)


def test_hooks_of_a_tensor_are_seen():
    tensor = torch.ones(1, requires_grad=True)
    assert compat.tensor_hooks(tensor) == []
    tensor.register_hook(print)
    assert compat.tensor_hooks(tensor) == [print]


def test_replicas_are_made_by_another_function_until_that_is_taken_back():
    module = nn.Linear(2, 2)
    assert not compat.is_watched(module)
    compat.watch_replicas(module, lambda: "ours")
    assert module._replicate_for_data_parallel() == "ours"  # as nn.DataParallel calls it
    assert compat.is_watched(module)
    replica = compat.replicate(module)
    assert not compat.is_watched(replica)
    assert isinstance(replica, nn.Linear)
    assert replica._replicate_for_data_parallel() != "ours"
    compat.unwatch_replicas(module)
    assert not compat.is_watched(module)
    assert isinstance(module._replicate_for_data_parallel(), nn.Linear)


def test_a_write_in_place_is_seen():
    tensor = torch.ones(2)
    version = compat.version_of(tensor)
    tensor + 1
    assert compat.version_of(tensor) == version
    tensor[0] = 3
    assert compat.version_of(tensor) != version


def test_a_model_on_the_meta_device_runs_on_fake_tensors():
    with torch.device("meta"):
        module = nn.Linear(2, 5)
    with compat.fake_tensors():
        result = module(torch.zeros(3, 2, device="meta"))
    assert result.shape == (3, 5)


def test_sizes_that_are_marked_are_compiled_one_by_one():
    seen = []

    def backend(graph, inputs):
        seen.append([x.shape for x in inputs if isinstance(x, torch.Tensor)])
        return graph.forward

    torch._dynamo.reset()
    function = torch.compile(lambda x: x + 1, backend=backend)
    for length in (3, 4, 5):
        x = torch.ones(length)
        compat.mark_static(x)
        function(x)
    assert [list(map(tuple, shapes)) for shapes in seen] == [[(3,)], [(4,)], [(5,)]]


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (torch._subclasses.fake_tensor, "FakeTensorMode", compat.fake_tensors),
        (torch._dynamo, "mark_static", lambda: compat.mark_static(torch.ones(1))),
        (nn.Module, "_replicate_for_data_parallel", lambda: compat.replicate(nn.Linear(1, 1))),
        (nn.Module, "_replicate_for_data_parallel", lambda: compat.watch_replicas(nn.Linear(1, 1), print)),
    ],
)
def test_a_missing_name_is_refused_in_a_sentence(owner, name, call, monkeypatch):
    monkeypatch.delattr(owner, name)
    with pytest.raises(IncompatibleVersionError, match=rf"parscale needs torch\.\S*{name}, which the installed torch "):
        call()


@pytest.mark.parametrize("name", ["_parameters", "_buffers"])
def test_a_module_without_its_dictionaries_is_refused(name):
    module = nn.Linear(1, 1)
    del vars(module)[name]
    with pytest.raises(IncompatibleVersionError, match=rf"Module\.{name}, which the installed torch"):
        compat.held_buffers(module) if name == "_buffers" else compat.set_parameter(module, "weight", nn.Parameter())


@pytest.mark.parametrize("name", compat._HOOKS)
def test_a_module_without_a_dictionary_of_hooks_is_refused(name):
    module = nn.Linear(1, 1)
    compat.require_hooks(module)
    del vars(module)[name]
    with pytest.raises(IncompatibleVersionError, match=rf"Module\.{name}, which the installed torch"):
        compat.require_hooks(module)


def test_every_dictionary_that_is_read_is_checked():
    read = {name for name in compat.has_hooks.__code__.co_names if name.startswith("_")}
    assert read == set(compat._HOOKS)


@pytest.mark.parametrize(("name", "call"), [("_version", compat.version_of), ("_backward_hooks", compat.tensor_hooks)])
def test_a_tensor_without_a_name_is_refused(name, call):
    """torch's own tensors cannot lose one: an object of a class that is called the same."""
    tensor = type("Tensor", (), {"__module__": "torch"})()
    with pytest.raises(IncompatibleVersionError, match=rf"torch\.Tensor\.{name}, which the installed torch"):
        call(tensor)


def test_a_model_is_left_as_it_was(make, unharmed, monkeypatch):
    model = make()
    with unharmed(model), monkeypatch.context() as patch:
        patch.delattr(nn.Module, "_replicate_for_data_parallel")
        with pytest.raises(IncompatibleVersionError, match="_replicate_for_data_parallel"):
            parscale.wrap(model, 2, prefix_length=3, init="random")
    parscale.wrap(model, 2, prefix_length=3, init="random")


# -- those of the kernels


def test_transforms_of_torch_func_are_seen():
    seen = []
    torch.func.vmap(lambda x: seen.append(kernels.functorch_transforms_are_active()) or x)(torch.ones(2))
    assert seen == [True]
    assert not kernels.functorch_transforms_are_active()


def test_flash_attention_gives_the_log_sum_exp_and_its_gradients():
    query, key, value = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    output, lse = kernels.flash_for_cpu()(query, key, value, 0.0, False, scale=0.5)
    scores = query @ key.mT * 0.5  # (1, 2, 5, 5)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(output, scores.softmax(-1) @ value)
    gradient = torch.ones_like(output)
    found = kernels.flash_for_cpu_backward()(gradient, query, key, value, output, lse, 0.0, False, scale=0.5)
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    result = (inputs[0] @ inputs[1].mT * 0.5).softmax(-1) @ inputs[2]
    for own, expected in zip(found, torch.autograd.grad(result, inputs, gradient), strict=True):
        torch.testing.assert_close(own, expected)


def test_the_operators_of_gpus_take_what_they_are_given():
    schema = kernels.flash_for_gpu().default._schema
    assert [x.name for x in schema.arguments] == [
        *("query", "key", "value", "dropout_p", "is_causal", "return_debug_mask", "scale"),
    ]
    assert [x.name for x in schema.returns][:2] == ["output", "logsumexp"]
    backward = kernels.flash_for_gpu_backward().default._schema
    assert [x.name for x in backward.arguments] == [
        *("grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
        *("dropout_p", "is_causal", "philox_seed", "philox_offset", "scale"),
    ]


@pytest.mark.parametrize(
    "call",
    [
        kernels.functorch_transforms_are_active,
        kernels.flash_for_cpu,
        kernels.flash_for_cpu_backward,
        kernels.flash_for_gpu,
        kernels.flash_for_gpu_backward,
    ],
)
def test_a_missing_operator_is_refused_in_a_sentence(call, monkeypatch):
    class Nothing:
        aten = None

    monkeypatch.setattr(kernels.torch, "_C", Nothing)
    monkeypatch.setattr(kernels.torch, "ops", Nothing)
    with pytest.raises(
        ImportError, match=r"parscale needs torch's _\w+, which torch \S+ does not have: install an older"
    ):
        call()
