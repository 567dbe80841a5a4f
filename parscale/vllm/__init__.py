"""A vLLM plugin: ``vllm serve FOLDER`` on a full checkpoint with parallel streams.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` and calls it in each of its processes. How the
streams run in it:

- a token is P rows of the linear layers, and one row of ``P * heads`` heads of the attention, stream-major, so that
  vLLM's paged cache, batching, prefix caching and chunked prefill work as they are (:mod:`parscale.vllm.models`);
- the prefix lies in T slots of the cache in front of each request. The engine's scheduler puts them there, and nobody
  outside the engine sees them (:mod:`parscale.vllm.scheduler`);
- out of a sliding window such slots would fall: there the prefix is attended to apart (:mod:`parscale.vllm.windows`);
- what cannot be served is refused at the start (:mod:`parscale.vllm.startup`).
"""

from __future__ import annotations

# The classes of vLLM that are served with streams, and the modules of vllm.model_executor.models that hold them.
FAMILIES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
}
TESTED = ("0.32",)  # minor versions: with them the parts of vLLM move that this is built on


def register() -> None:
    """Makes full checkpoints known to transformers, and their classes to vLLM."""
    import vllm
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry

    from parscale.auto import causal_lm_in_checkpoints

    reason = None
    if ".".join(vllm.__version__.split(".")[:2]) not in TESTED:
        reason = (
            f"vLLM {vllm.__version__} is installed, and this version of parscale serves models with streams by vLLM "
            f"{' and '.join(TESTED)}: pip install 'parscale[vllm]'."
        )
    names = {name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if isinstance(name, str)}
    for name in sorted(names | FAMILIES.keys()):
        architecture = causal_lm_in_checkpoints(name)
        if reason is None and name in FAMILIES:
            from parscale.vllm.startup import serve

            ModelRegistry.register_model(architecture, f"parscale.vllm.models:{architecture}")
            serve(architecture)
        else:
            from parscale.vllm.refusal import refuse

            refuse(
                architecture,
                reason
                or f"vLLM serves {', '.join(FAMILIES)} with streams, and this checkpoint is {architecture}: "
                "`transformers serve --trust-remote-code` serves any.",
            )
