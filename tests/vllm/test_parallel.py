"""Tensor parallelism: two processes give what one gives."""

import pytest
import torch
from torch import nn


def test_two_processes(make_folder, serving):
    folder = make_folder("Qwen2", 4)
    prompts = serving.prompts([1, 30, 200])
    with serving.engine(folder, tensor_parallel_size=2, max_num_batched_tokens=96) as llm:
        outputs = serving.greedy(llm, prompts, 8, logprobs=0)
    assert [output.prompt_token_ids for output in outputs] == prompts
    serving.agree(outputs, folder, 8)


@pytest.mark.parametrize(("kv", "fuses"), [("own", False), ("shared", True)])
def test_sums_are_fused_with_norms_where_they_have_a_row_for_each_token(make_folder, serving, monkeypatch, kv, fuses):
    """vLLM does so by default on some GPUs, and sizes the buffer by tokens; own keys have P rows for each."""
    from vllm.config import PassConfig
    from vllm.config.vllm import OPTIMIZATION_LEVEL_02

    monkeypatch.setattr(PassConfig, "flashinfer_max_size", lambda self, processes: None)  # asks the GPU
    monkeypatch.setitem(OPTIMIZATION_LEVEL_02["compilation_config"]["pass_config"], "fuse_allreduce_rms", True)
    folder = make_folder("Qwen2", 4, kv=kv)
    config = serving.configured(folder, tensor_parallel_size=2, enforce_eager=False)
    assert config.compilation_config.pass_config.fuse_allreduce_rms is fuses


def test_sums_fused_with_norms_are_refused_for_own_keys(make_folder, serving):
    wanted = {"pass_config": {"fuse_allreduce_rms": True}}
    with pytest.raises(ValueError, match=r"without fuse_allreduce_rms in .* with own keys and values: leave it"):
        serving.configured(make_folder("Qwen2", 4), tensor_parallel_size=2, compilation_config=wanted)


def test_the_aggregators_weights_are_shared_out(monkeypatch):
    """Each process's part, on rows that lie stream by stream, adds up to the logits of the released order."""
    from parscale.integrations.vllm import aggregator as own

    P, H, N, processes = 3, 8, 5, 2
    x, first, last = torch.randn(N, P, H), torch.randn(H, H * P), torch.randn(P, H)
    inner = nn.functional.silu(x.transpose(1, 2).flatten(1) @ first.T)  # released: hidden index outer, stream inner
    ((name, rearranged), other) = own.stream_outer(
        [("model.aggregate_layer.0.weight", first), ("model.aggregate_layer.2.weight", last)], P
    )
    assert name.endswith("0.weight")
    assert other[1] is last
    monkeypatch.setattr(own, "get_tensor_model_parallel_world_size", lambda: processes)
    total = torch.zeros(N, P)
    for rank, part in enumerate(rearranged.chunk(processes)):
        monkeypatch.setattr(own, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        columns = nn.Parameter(torch.zeros(P, H // processes), requires_grad=False)
        own._load_columns(columns, last)
        total += nn.functional.silu(x.flatten(1) @ part.T) @ columns.T
    torch.testing.assert_close(total, inner @ last.T)
    with pytest.raises(ValueError, match=r"\(3, 9\) and does not fit"):
        own._load_columns(columns, torch.zeros(3, 9))


@pytest.mark.parametrize(
    ("heads", "processes", "expected"),
    [(4, 1, [[0, 1, 2, 3]]), (4, 2, [[0, 1], [2, 3]]), (2, 4, [[0], [0], [1], [1]]), (1, 2, [[0], [0]])],
)
def test_the_prefixs_heads_are_shared_out(monkeypatch, heads, processes, expected):
    """As those of the backbone: where there are fewer than processes, several have the same one."""
    from parscale.integrations.vllm import models

    whole = torch.arange(float(heads)).view(1, heads, 1, 1).expand(3, heads, 5, 2)
    monkeypatch.setattr(models, "get_tensor_model_parallel_world_size", lambda: processes)
    for rank, own in enumerate(expected):
        monkeypatch.setattr(models, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        parameter = nn.Parameter(torch.zeros(3, len(own), 5, 2), requires_grad=False)
        models._load_heads(parameter, whole)
        assert torch.equal(parameter, whole[:, own])
