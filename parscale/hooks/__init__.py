"""What hangs on a wrapped model, and what adding a set of streams does to it.

- `backbone`: rows are copied before the backbone and mixed after it
- `rows`: which arguments have a row for each sequence
- `encoded`: what a wrapped encoder returns
- `recomputation`: gradient checkpointing with the streams of the forward pass
- `adding`: a set comes or goes
- `trial`: the whole model runs with a new set before it is promised
- `surroundings`: what a caller has chosen that must not reach new tensors

May import: `transforms` and what is below it.
"""
