"""Models for runtimes that know nothing of streams.

- `decoder`: a model as a graph takes it, its cache among the tensors
- `experts`: mixtures of experts in a graph
- `graph`: the ONNX graph of it
- `comparison`: what the graph gives beside what the model gives
- `quantization`: weights in 8 or 4 bits
- `genai`: the configuration of ONNX Runtime GenAI
- `onnx`: all of it for a checkpoint

May import: `checkpoints` and what is below it.
"""
