"""Engines that compile the model, as vLLM runs by default, answer what transformers answers."""

import pytest
import torch

import parscale

# The compiler is taken to know the processor's vector instructions: else six programs find that out at each start.
KNOWN = {"inductor_compile_config": {"cpp.vec_isa_ok": True}}


def agrees(llm, serving, folder, new):
    """Requests that come at once; then the same, of which all but the first find their prompts in the cache."""
    prompts = serving.prompts([3, 40, 100], seed=8)
    model = parscale.load(folder, dtype=torch.float32).eval()
    expected = [serving.reference(model, ids, new)[0] for ids in prompts]
    outputs = [serving.greedy(llm, prompts, new) for _ in range(2)]
    assert [output.num_cached_tokens > 0 for output in outputs[1]] == [False, True, True]
    return [[list(output.outputs[0].token_ids) for output in found] for found in outputs] == [expected, expected]


@pytest.mark.parametrize(("family", "kv"), [("Qwen3", "own"), ("Qwen2", "shared")])
def test_by_inductor(make_folder, serving, family, kv):
    """In chunks, too."""
    folder = make_folder(family, 4, kv=kv)
    with serving.engine(
        folder, enforce_eager=False, block_size=32, max_num_batched_tokens=64, compilation_config=KNOWN
    ) as llm:
        assert agrees(llm, serving, folder, 12)


@pytest.mark.parametrize("kv", ["own", "shared"])
def test_cut_into_pieces(make_folder, serving, monkeypatch, kv):
    """As vLLM runs on GPUs by default: the graph is cut at the attention, and a piece knows how many tokens it may get.

    On a CPU vLLM switches this off; here it is on, with eager torch in place of the compiler. A piece that took the P
    rows of a token for P tokens would find more than it may get; with shared keys it gets rows, and knows how many.
    """
    from vllm.compilation.counter import compilation_counter
    from vllm.platforms.cpu import CpuPlatform

    own = CpuPlatform.check_and_update_config.__func__

    def keeps_the_mode(cls, vllm_config):
        compilation = vllm_config.compilation_config
        mode = compilation.mode
        own(cls, vllm_config)
        compilation.mode, compilation.backend, compilation.compile_sizes = mode, "eager", []

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(keeps_the_mode))
    folder = make_folder("Qwen2", 4, kv=kv)
    before = compilation_counter.num_piecewise_graphs_seen
    pieces = {"mode": 3, "cudagraph_mode": "NONE"}
    with serving.engine(
        folder, enforce_eager=False, block_size=32, max_num_batched_tokens=32, compilation_config=pieces
    ) as llm:
        assert compilation_counter.num_piecewise_graphs_seen - before == 5  # two layers' attentions, and around them
        assert agrees(llm, serving, folder, 12)
