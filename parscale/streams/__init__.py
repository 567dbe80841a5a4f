"""The sets of streams of a model: data, and which of it runs and trains.

- `naming`: which tensors are streams', by their names
- `backbones`: the part of a model whose rows are copied and mixed
- `places`: where parameters of streams can live
- `sets`: a set of streams, and the interface of what makes its streams differ
- `calls`: which set runs, in this thread and in this forward pass
- `state`: all of that for one model: `model.parscale`
- `aggregator`: the learned mixture
- `trainability`: which parameters of the sets train
- `choosing`: `set_streams`, `use_streams`, `num_streams`
- `brief_runs`: runs of the backbone that show what it is made of

May import: `parscale.kernels`, `distributed`.
"""
