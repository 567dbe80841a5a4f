"""Support for other libraries, if they are installed.

- `accelerate`: texts are not cut over devices
- `peft`: each adapter has its own streams
- `trl`: the reference model of a wrapped model is a copy of it
- `vllm`: a plugin that serves full checkpoints

May import: `format` and what is below it; `vllm` also `parscale.auto`, since nothing here imports it.
"""
