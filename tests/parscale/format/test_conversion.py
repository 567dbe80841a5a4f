"""Classes that join or split tensors on the way to a file keep low-rank streams in the joined modules."""

import pytest
import torch
from scripts import load_script
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from parscale import UnsupportedModelError, load, wrap

*_, classes = map(load_script, ("tiny_models", "tiny_inputs", "promises", "support", "classes"))


def joining():
    """The backbone of each type whose rules act on whole modules."""
    found = []
    for kind, name in MODEL_MAPPING_NAMES.items():
        rules = get_checkpoint_conversion_mapping(kind) or []
        patterns = [each for rule in rules if isinstance(rule, WeightConverter) for each in rule.target_patterns]
        if isinstance(name, str) and not all(pattern.endswith((".weight", ".bias")) for pattern in patterns):
            found.append(name)
    return sorted(set(found))


# four types with rules of their own; the others at night
DAILY = {"GteModel", "JinaEmbeddingsV3Model", "MixtralModel", "NomicBertModel"}


@pytest.mark.parametrize(
    "name", [name if name in DAILY else pytest.param(name, marks=pytest.mark.nightly) for name in joining()]
)
def test_low_rank_streams_come_back(name, tmp_path):
    model = classes.build(name)
    try:
        wrap(model, 2, transform="lora", rank=2)
    except UnsupportedModelError:
        pytest.skip("takes no low-rank streams")
    for parameter in (each for key, each in model.named_parameters() if "stream_" in key):
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is type(model)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items() if "stream_" in key)
    assert sum("stream_up" in key for key in before) > 1


def test_every_daily_type_is_joined():
    assert set(joining()) >= DAILY
