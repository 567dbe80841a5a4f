"""A tiny model of each kind that the tests here need."""

import pytest
import torch
import transformers
from small_models import TINY

SIZES = TINY | {"max_position_embeddings": 32}


@pytest.fixture
def make():
    """Makes a tiny causal language model; the same weights each time."""

    def make(family="Qwen2", **fields):
        config = getattr(transformers, f"{family}Config")(**SIZES | fields)
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.fixture
def ids():
    return torch.arange(1, 13).view(2, 6)


@pytest.fixture
def unharmed():
    """A context: whatever it raises, a model is then what it was."""
    return Unharmed


class Unharmed:
    """Compares a model before and after: outputs, tensors, hooks, attributes and configuration."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.before = seen(self.model)

    def __exit__(self, *error):
        after = seen(self.model)
        assert torch.equal(after.pop("logits"), self.before.pop("logits"))
        assert after == self.before


@torch.no_grad()
def seen(model):
    return {
        "logits": model(input_ids=torch.arange(1, 13).view(2, 6)).logits,
        "tensors": list(model.state_dict()),
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "hooks": {
            name: [len(vars(module)[kind]) for kind in vars(module) if kind.endswith("_hooks")]
            for name, module in model.named_modules()
        },
        "configs": {name: type(getattr(module, "config", None)) for name, module in model.named_modules()},
        "fields": model.config.to_dict(),
    }
