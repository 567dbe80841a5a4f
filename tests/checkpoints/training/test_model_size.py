"""The shapes of new models of which only a size is given."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from parscale.checkpoints.training.model_size import configuration, shape_of

SIZES = st.floats(math.log(1e5), math.log(1e10)).map(math.exp)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SIZES, SIZES)
def test_a_shape_has_about_the_size_and_grows_with_it(one, other):
    smaller, larger = (shape_of(size) for size in sorted((one, other)))
    assert smaller.parameters <= larger.parameters
    for size, shape in zip(sorted((one, other)), (smaller, larger), strict=True):
        assert abs(shape.parameters / size - 1) < 0.15
        assert shape.width % 64 == shape.mlp % 64 == shape.heads % shape.key_value_heads == 0
        assert shape.layers >= max(2, shape.width // 64)
        assert 8 / 3 * shape.width - 32 <= shape.mlp <= 5 * shape.width


@pytest.mark.parametrize(("size", "tied"), [(1e5, True), (3e5, True), (2e7, True), (3.5e8, True), (1.5e9, False)])
def test_the_model_has_as_many_parameters_as_its_shape(size, tied):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**configuration(size, 300, 100)))
    embeddings = ("model.embed_tokens.weight", "lm_head.weight")
    counted = sum(each.numel() for name, each in model.named_parameters() if name not in embeddings)
    assert counted == shape_of(size).parameters
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("size", [1e5, 1e12])
def test_the_ends_of_what_is_allowed(size):
    assert abs(shape_of(size).parameters / size - 1) < 0.15
