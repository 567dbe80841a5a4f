"""accelerate's hooks are found where they are, and put back."""

import inspect

import pytest
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from parscale.compat import accelerate as compat
from parscale.errors import IncompatibleVersionError


class Passive(ModelHook):
    """Does nothing, and runs nowhere in particular."""


def test_a_module_without_a_hook():
    module = nn.Linear(2, 2)
    assert compat.hook_of(module) is None
    assert compat.hooks_of(module) == []
    assert compat.offloading_hook(module) is None
    assert compat.execution_device_of(module) is None


def test_one_hook_and_several():
    module, hook, other = nn.Linear(2, 2), Passive(), Passive()
    add_hook_to_module(module, hook)
    assert compat.hook_of(module) is hook
    assert compat.hooks_of(module) == [hook]
    add_hook_to_module(module, other, append=True)
    assert isinstance(compat.hook_of(module), SequentialHook)
    assert compat.hooks_of(module) == [hook, other]


def test_a_version_without_prepare_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.delattr(Accelerator, "prepare")
    with pytest.raises(IncompatibleVersionError, match=r"Accelerator\.prepare, which the installed accelerate"):
        compat.extend_prepare(lambda original, *args: original(*args))


def test_an_offloaded_module_says_where_it_runs_and_what_it_holds():
    module = nn.Linear(2, 2)
    weight = module.weight.detach().clone()
    cpu_offload(module, execution_device=torch.device("cpu"))
    hook = compat.offloading_hook(module)
    assert module.weight.is_meta
    assert torch.equal(hook.weights_map["weight"], weight)
    assert torch.device(compat.execution_device_of(module)) == torch.device("cpu")


def test_a_hook_in_the_place_of_another_runs():
    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    expected = 2 * module(x)
    add_hook_to_module(module, Passive())
    compat.put_hook(module, Doubling())
    assert torch.equal(module(x), expected)
    remove_hook_from_module(module)
    assert compat.hook_of(module) is None


def test_what_an_accelerator_prepares_goes_through_the_extension(monkeypatch):
    """Once, also where it is asked for again."""
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "prepare", inspect.unwrap(Accelerator.prepare))  # as it is without parscale
    seen = []

    def extension(prepare, accelerator, *objects, **options):
        seen.append((accelerator, objects, options))
        return prepare(accelerator, *objects, **options)

    for _ in range(2):
        compat.extend_prepare(extension)
    accelerator, module = Accelerator(cpu=True), nn.Linear(2, 2)
    assert accelerator.prepare(module, device_placement=[False]) is module
    assert seen == [(accelerator, (module,), {"device_placement": [False]})]


@pytest.mark.parametrize("attribute", ["offload", "execution_device", "weights_map"])
def test_attributes_of_a_hook_that_offloads(attribute):
    from accelerate.hooks import AlignDevicesHook

    assert hasattr(AlignDevicesHook(), attribute)
