"""Libraries that streams run under, where they are installed.

- `patching`: functions of libraries, extended
- `peft`: each adapter has streams of its own
- `trl`: the reference of a wrapped model is a copy of it
- `vllm`: a plugin that serves full checkpoints

May import: `format` and what is below it; `vllm` also `parscale.auto`, since nothing here imports it.
"""
