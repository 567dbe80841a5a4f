"""A vLLM plugin: `vllm serve FOLDER` on a full checkpoint with parallel streams.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. How the
streams run in it:

- a token is P rows of the linear layers, and one row of `P * heads` heads of the attention, stream-major, so that
  vLLM's paged cache, batching, prefix caching and chunked prefill work as they are
  (`parscale.integrations.vllm.models`);
- the prefix lies in T slots of the cache in front of each request. The engine's scheduler puts them there, and nobody
  outside the engine sees them (`parscale.integrations.vllm.scheduler`);
- out of a sliding window such slots would fall: there the prefix is attended to apart
  (`parscale.integrations.vllm.windows`);
- what cannot be served is refused at the start (`parscale.integrations.vllm.startup`).
"""

from __future__ import annotations

FAMILIES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM")
TESTED = ("0.32",)  # minor versions of vLLM: with them the parts of it move that this is built on


def register() -> None:
    """Makes full checkpoints known to transformers, and their classes to vLLM, to be served or refused."""
    import vllm

    import parscale.auto  # makes transformers read full checkpoints  # noqa: F401
    from parscale.format.architectures import architectures_in_checkpoints, causal_lm_in_checkpoints
    from parscale.integrations.vllm.refusal import refuse

    reason = None
    if ".".join(vllm.__version__.split(".")[:2]) not in TESTED:
        reason = (
            f"vLLM {vllm.__version__} is installed, and this version of parscale serves models with streams by vLLM "
            f"{' and '.join(TESTED)}: pip install 'parscale[vllm]'."
        )
    served = set() if reason else {causal_lm_in_checkpoints(name) for name in FAMILIES}
    for architecture in architectures_in_checkpoints() - served:
        other = f"vLLM serves {', '.join(FAMILIES)} with streams, and this checkpoint is {architecture}"
        refuse(architecture, reason or f"{other}: `transformers serve --trust-remote-code` serves any language model.")
    for architecture in served:
        from parscale.integrations.vllm.startup import serve

        serve(architecture)
