"""vLLM has the names that the plugin is built on."""

import importlib
import inspect
import types

import pytest

from parscale.compat import vllm as compat
from parscale.errors import IncompatibleVersionError

GPU_ONLY = {"flash_attn_varlen_func"}


@pytest.mark.parametrize("name", sorted(set(compat._PLACES) - GPU_ONLY))
def test_the_name_is_there(name):
    module, _, own_name = compat._PLACES[name].partition(":")
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
    request = types.SimpleNamespace(
        prompt_token_ids=[5, 6], _all_token_ids=[5, 6], num_prompt_tokens=2, block_hashes=["of 5, 6"]
    )
    request.update_block_hashes = lambda: request.block_hashes.append(tuple(request._all_token_ids))
    compat.put_in_front(request, [0, 0, 0])
    assert request.prompt_token_ids == request._all_token_ids == [0, 0, 0, 5, 6]
    assert request.num_prompt_tokens == 5
    assert request.block_hashes == [(0, 0, 0, 5, 6)]


def test_a_request_of_vllm_has_these_lists():
    source = inspect.getsource(importlib.import_module("vllm.v1.request").Request)
    for name in ("prompt_token_ids", "_all_token_ids", "num_prompt_tokens", "block_hashes", "update_block_hashes"):
        assert name in source


def test_a_missing_name_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setitem(compat._PLACES, "Gone", "vllm.logger")
    with pytest.raises(
        IncompatibleVersionError, match=r"parscale needs vllm\.logger\.Gone, which the installed vllm 0\."
    ):
        getattr(compat, "Gone")  # noqa: B009


def test_any_other_name_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'Elsewhere'"):
        getattr(compat, "Elsewhere")  # noqa: B009
