"""accelerate's `prepare` refuses to cut a wrapped model's texts over devices, and prepares it as before otherwise."""

import pytest
from accelerate import Accelerator, ParallelismConfig
from torch import nn

import parscale


@pytest.fixture
def prepare(monkeypatch):
    """Prepares objects under a parallelism that this machine need not have."""
    accelerator = Accelerator(cpu=True)

    def run(*objects, **sizes):
        monkeypatch.setattr(Accelerator, "parallelism_config", ParallelismConfig(**sizes) if sizes else None)
        return accelerator.prepare(*objects)

    return run


@pytest.mark.parametrize("sizes", [{"cp_size": 2}, {"sp_size": 2}])
def test_texts_are_not_cut(sizes, tiny, prepare):
    model = parscale.wrap(tiny(), 2, prefix_length=4, init="random")
    for given in (model, nn.ModuleList([model])):
        with pytest.raises(ValueError, match="set cp_size and sp_size to 1, and shard the model by FSDP2"):
            prepare(given, **sizes)


def test_without_that_it_is_prepared(tiny, prepare):
    model = parscale.wrap(tiny(), 2, prefix_length=4, init="random")
    assert prepare(model) is model


def test_without_streams_in_use_texts_may_be_cut(tiny, prepare):
    model = parscale.wrap(tiny(), 2, prefix_length=4, init="random")
    model.set_streams(None)
    assert prepare(model, sp_size=2) is model
