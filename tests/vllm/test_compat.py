"""vLLM has the names that the plugin is built on."""

import importlib
import inspect

import pytest

from parscale.compat import vllm as compat
from parscale.errors import IncompatibleVersionError

GPU_ONLY = {"flash_attn_varlen_func"}


@pytest.mark.parametrize("name", sorted(set(compat._MODULES) - GPU_ONLY))
def test_the_name_is_there(name):
    module, _, own_name = compat._MODULES[name].partition(":")
    assert getattr(compat, name) is getattr(importlib.import_module(module), own_name or name)
    assert name in dir(compat)


def test_layers_take_what_they_are_given():
    parameters = inspect.signature(compat.Attention.__init__).parameters
    assert {
        "num_kv_heads",
        "cache_config",
        "quant_config",
        "per_layer_sliding_window",
        "prefix",
        "attn_backend",
    } <= set(parameters)


def test_tokens_are_put_in_front_of_a_request():
    from vllm import SamplingParams

    def hashes(request):
        """As vLLM asks: of the blocks, here of two tokens, that have none yet."""
        tokens, first = tuple(request.all_token_ids), 2 * len(request.block_hashes)
        return [tokens[: end + 2] for end in range(first, len(tokens) - 1, 2)]

    request = compat.Request("0", [5, 6], SamplingParams(max_tokens=1), None, block_hasher=hashes)
    assert request.block_hashes == [(5, 6)]
    compat.put_in_front(request, [0, 0, 0])
    assert request.prompt_token_ids == request._all_token_ids == [0, 0, 0, 5, 6]
    assert list(request.all_token_ids) == [0, 0, 0, 5, 6]
    assert request.num_prompt_tokens == 5
    assert request.block_hashes == [(0, 0), (0, 0, 0, 5)]


def test_models_are_checked_before_their_classes_are_looked_for(monkeypatch):
    from vllm import ModelRegistry

    seen = []
    monkeypatch.setattr(ModelRegistry, "inspect_model_cls", lambda architectures, model_config: "its own answer")
    compat.before_inspection(lambda names, model_config: seen.append((names, model_config)))
    assert ModelRegistry.inspect_model_cls("One", 1) == ModelRegistry.inspect_model_cls(["One"], 2) == "its own answer"
    assert seen == [(["One"], 1), (["One"], 2)]
    assert list(inspect.signature(type(ModelRegistry).inspect_model_cls).parameters)[1:] == [
        "architectures",
        "model_config",
    ]


def test_a_missing_name_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setitem(compat._MODULES, "Gone", "vllm.logger")
    with pytest.raises(
        IncompatibleVersionError, match=r"parscale needs vllm\.logger\.Gone, which the installed vllm 0\."
    ):
        getattr(compat, "Gone")  # noqa: B009


def test_any_other_name_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'Elsewhere'"):
        getattr(compat, "Elsewhere")  # noqa: B009
