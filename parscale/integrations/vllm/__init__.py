"""A vLLM plugin: `vllm serve FOLDER` on a full checkpoint with parallel streams.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. How the
streams run in it:

- in the linear layers a token has P rows; in the attention it has one row with `P * heads` heads, stream-major. So
  vLLM's paged cache, batching, prefix caching and chunked prefill work unchanged
  (`parscale.integrations.vllm.models`);
- the prefix takes T slots of the cache before each request. The engine's scheduler adds them; nothing outside the
  engine sees them (`parscale.integrations.vllm.scheduler`);
- a sliding window would hide such slots: models with one attend to the prefix separately
  (`parscale.integrations.vllm.windows`);
- unsupported checkpoints and settings raise an error at startup (`parscale.integrations.vllm.startup`).
"""

from __future__ import annotations

FAMILIES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM")
TESTED = ("0.32", "0.33")  # minor versions of vLLM: others may change the internals that this plugin uses


def register() -> None:
    """Registers full checkpoints with transformers, and their classes with vLLM, which serves or refuses them."""
    import vllm

    import parscale.auto  # makes transformers read full checkpoints  # noqa: F401
    from parscale.format.architectures import architectures_in_checkpoints, causal_lm_in_checkpoints
    from parscale.integrations.vllm.refusal import register_refused

    reason = None
    if ".".join(vllm.__version__.split(".")[:2]) not in TESTED:
        reason = (
            f"vLLM {vllm.__version__} is installed, but this version of parscale serves models with streams by vLLM "
            f"{' and '.join(TESTED)}: pip install 'parscale[vllm]'."
        )
    served = set() if reason else {causal_lm_in_checkpoints(name) for name in FAMILIES}
    known = architectures_in_checkpoints()
    for architecture in known - served:
        other = (
            f"vLLM serves {', '.join(FAMILIES)} with streams, but this checkpoint is {architecture}: "
            "`transformers serve --trust-remote-code` serves any language model."
        )
        register_refused(architecture, reason or other)
    if served:
        from parscale.integrations.vllm.startup import refuse_unprepared, serve

        for architecture in served:
            serve(architecture)
        refuse_unprepared(known)
