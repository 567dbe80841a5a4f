"""The hooks on a wrapped model, and how sets of streams are added and removed.

- `backbone`: rows are copied before the backbone and mixed after it
- `two_passes`: stream 0 runs first, alone, and the others only where they are needed
- `rows`: which arguments have a row for each sequence
- `encoded`: the marked output of a wrapped encoder
- `recomputation`: gradient checkpointing with the streams of the forward pass
- `adding`: adds and removes a set of streams
- `trial`: tries the whole model with a new set before `wrap` accepts it
- `stream_losses`: the losses and weights of all streams in one pass
- `surroundings`: settings of the caller (inference mode, autocast) that must not affect new tensors

May import: `transforms` and what is below it.
"""
