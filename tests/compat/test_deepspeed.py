"""ZeRO-3's parameters and engine are told from others; DeepSpeed itself has no place on a CPU, so that these stand in.

The stand-ins have the names that DeepSpeed 0.15 to 0.18 give: `ds_id` and `ds_shape` on a parameter, and the class
`ZeROOrderedDict` for the parameters of a module.
"""

import contextlib
import sys
import types
from collections import OrderedDict

import pytest
import torch
from torch import nn

from parscale.compat import deepspeed as compat
from parscale.distributed.parallel import check_takes_parameters, each_module_gathered, whole
from parscale.errors import IncompatibleVersionError


@pytest.fixture
def partitioned():
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_id, parameter.ds_shape = 1, torch.Size([2, 3])
    return parameter


@pytest.fixture
def deepspeed(monkeypatch):
    """Fills a parameter while it is gathered, as DeepSpeed does."""

    @contextlib.contextmanager
    def gathered_parameters(parameters):
        for parameter in parameters:
            parameter.data = torch.full(tuple(parameter.ds_shape), 7.0)
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    module = types.ModuleType("deepspeed")
    module.__version__ = "0.17"
    module.zero = types.ModuleType("deepspeed.zero")
    module.zero.GatheredParameters = gathered_parameters
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    return module


def test_a_plain_parameter():
    parameter = nn.Parameter(torch.ones(2, 3))
    assert not compat.is_partitioned(parameter)
    assert compat.whole_shape(parameter) == (2, 3)


def test_a_parameter_in_pieces(partitioned, deepspeed):
    assert compat.is_partitioned(partitioned)
    assert compat.whole_shape(partitioned) == (2, 3)
    assert torch.equal(whole(partitioned), torch.full((2, 3), 7.0))
    assert partitioned.numel() == 0


def test_a_module_that_fails_lets_its_parameters_go(partitioned, deepspeed):
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = partitioned

        def forward(self):
            assert torch.equal(self.weight, torch.full((2, 3), 7.0))
            raise RuntimeError("half-way")

    model = Failing()
    with pytest.raises(RuntimeError, match="half-way"), each_module_gathered(model):
        model()
    assert model.weight.numel() == 0


def test_a_version_without_gathering(partitioned, deepspeed):
    del deepspeed.zero.GatheredParameters
    with pytest.raises(
        IncompatibleVersionError, match=r"deepspeed\.zero\.GatheredParameters, which the installed deep"
    ):
        whole(partitioned)


def test_a_model_in_the_engine_takes_no_parameters():
    model = nn.Linear(2, 2)
    assert not compat.is_of_engine(model)
    check_takes_parameters(model)
    model._parameters = type("ZeROOrderedDict", (OrderedDict,), {})(model._parameters)
    assert compat.is_of_engine(model)
    with pytest.raises(ValueError, match="sharded by DeepSpeed"):
        check_takes_parameters(model)
