"""vLLM: the layers, models, scheduler and attention of the engine that streams use.

vLLM documents how a model class is registered (`ModelRegistry`, the plugin's entry point) and nothing of what such a
class is made of. So everything else is here, by one table: a name, its module, and what it is for (and after a colon
vLLM's own name, where another thing of vLLM's has it too). A name is imported when it is first asked for, since some of
their modules are slow to import or need a device. Most are classes to derive from, for which a function would not do:
`from parscale.compat.vllm import Attention`.

Objects that vLLM passes (its configuration, requests, attention metadata) are read by attributes that are not
documented either. They change with each minor version; `parscale.integrations.vllm.TESTED` lists the supported
versions, and any other raises an error at startup.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parscale.compat.names import needed, needed_module
from parscale.compat.patching import extend

_MODELS, _LAYERS = "vllm.model_executor.models", "vllm.model_executor.layers"
_BACKENDS = "vllm.v1.attention.backends"
_MODULES = {
    # models: the base classes of the plugin's models, and the parts of a language model around them
    "LlamaModel": f"{_MODELS}.llama",
    "MistralModel": f"{_MODELS}.mistral",
    "Qwen2Model": f"{_MODELS}.qwen2",
    "Qwen3Model": f"{_MODELS}.qwen3",
    "SupportsQuant": f"{_MODELS}.interfaces",  # a model whose layers can be quantized
    "ParallelLMHead": f"{_LAYERS}.vocab_parallel_embedding",
    "LogitsProcessor": f"{_LAYERS}.logits_processor",
    "Attention": f"{_LAYERS}.attention",  # with its part of the paged cache; streams are its heads
    # weights: how they are named, split over devices and loaded
    "AutoWeightsLoader": f"{_MODELS}.utils",
    "maybe_prefix": f"{_MODELS}.utils",
    "set_weight_attrs": "vllm.model_executor.utils",
    "get_tensor_model_parallel_rank": "vllm.distributed",
    "get_tensor_model_parallel_world_size": "vllm.distributed",
    "tensor_model_parallel_all_reduce": "vllm.distributed",
    "ColumnParallelLinear": f"{_LAYERS}.linear",  # of the aggregator, split as vLLM splits its own layers
    # startup: each architecture's function that may change vLLM's configuration, or refuse it
    "VllmConfig": "vllm.config",
    "ModelConfig": "vllm.config",
    "MODELS_CONFIG_MAP": f"{_MODELS}.config",
    "VerifyAndUpdateConfig": f"{_MODELS}.config",
    # what `--model-impl transformers` takes as it is registered, and does not look for in transformers: so that the
    # function is asked there too
    "TRANSFORMERS_BACKEND_MODELS": f"{_MODELS}.registry:_TRANSFORMERS_BACKEND_MODELS",
    "init_logger": "vllm.logger",  # vLLM shows only lines of its own loggers
    # the scheduler, which puts slots for the prefix before each request and removes them from its output
    "Scheduler": "vllm.v1.core.sched.scheduler",
    "AsyncScheduler": "vllm.v1.core.sched.async_scheduler",
    "LogprobsTensors": "vllm.v1.outputs",
    "ModelRunnerOutput": "vllm.v1.outputs",
    "PrefillStats": "vllm.v1.metrics.stats",
    "Request": "vllm.v1.request",
    "SchedulerOutput": "vllm.v1.core.sched.output",
    "EngineCoreOutputs": "vllm.v1.engine",
    # attention over a cache; attention over a prefix is merged with it
    "AttentionBackendEnum": f"{_BACKENDS}.registry",  # the names of all backends
    "AttentionBackend": "vllm.v1.attention.backend",
    "AttentionMetadata": "vllm.v1.attention.backend",
    "CPUAttentionBackend": f"{_BACKENDS}.cpu_attn",
    "CPUAttentionBackendImpl": f"{_BACKENDS}.cpu_attn",
    "FlashAttentionBackend": f"{_BACKENDS}.flash_attn",
    "FlashAttentionImpl": f"{_BACKENDS}.flash_attn",
    "flash_attn_varlen_func": f"{_BACKENDS}.fa_utils",  # on GPUs only
    "merge_attn_states": "vllm.v1.attention.ops.merge_attn_states",
    "canonicalize_singleton_dim_strides": "vllm.utils.torch_utils",  # of the cache of one key head, for its kernel
    # what a step is: its metadata, its CUDA graph
    "get_forward_context": "vllm.forward_context",
    "CUDAGraphMode": "vllm.config",
    "is_breakable_cudagraph_enabled": "vllm.compilation.breakable_cudagraph",
    # what each request asks for, as the worker learns it: by Model Runner V1 as a logits processor, by V2 as the
    # model's state
    "LogitsProcessorV1": "vllm.v1.sample.logits_processor:LogitsProcessor",
    "LogitsProcessorV2": "vllm.v1.worker.gpu.sample.logits_processor:LogitsProcessor",
    "MoveDirectionality": "vllm.v1.sample.logits_processor",
    "BatchUpdate": "vllm.v1.sample.logits_processor",
    "DefaultModelState": "vllm.v1.worker.gpu.model_states.default",
    "NewRequestData": "vllm.v1.core.sched.output",
    "InputBatch": "vllm.v1.worker.gpu.input_batch",
    "RequestState": "vllm.v1.worker.gpu.states",
}


def __getattr__(name: str) -> Any:
    """Imports one of the names in the table.

    Raises:
        IncompatibleVersionError: the installed version does not have it.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, own_name = _MODULES[name].partition(":")
    return needed(needed_module(module), own_name or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


def before_inspection(check: Callable[[list[str], Any], None]) -> None:
    """Has vLLM call `check` before it looks for a model's class, which `--model-impl terratorch` names by itself.

    Args:
        check: takes the architectures of the checkpoint and vLLM's configuration of the model, and raises an error.
    """

    def inspect(original: Callable[..., Any], architectures: str | list[str], model_config: Any) -> Any:
        check([architectures] if isinstance(architectures, str) else architectures, model_config)
        return original(architectures, model_config)

    extend(needed(needed_module("vllm"), "ModelRegistry"), "inspect_model_cls", inspect)


def put_in_front(request: Any, tokens: list[int]) -> None:
    """Puts tokens before those of a request that the scheduler has not seen yet.

    vLLM keeps a request's tokens in two lists and its cache blocks as hashes of them, and can only append to them.
    """
    request.prompt_token_ids = tokens + request.prompt_token_ids
    request._all_token_ids[:0] = tokens
    request.num_prompt_tokens += len(tokens)
    request.block_hashes.clear()
    request.update_block_hashes()
