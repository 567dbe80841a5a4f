"""The sets of streams of a model: their data, and which of them runs and is trained.

- `naming`: recognizes the tensors of streams by name
- `backbones`: the part of a model whose rows are copied and mixed
- `layer_specs`: the sizes of layers that streams can change, and the parameters that they add
- `sets`: a set of streams, and the interface of transforms
- `calls`: which set runs, in this thread and in this call
- `passes`: calls that run stream 0 first, and the other streams where they are needed
- `state`: all of this for one model: `model.parscale`
- `aggregator`: the learned mixture of the streams
- `trainability`: which parameters of the sets are trainable
- `choosing`: `set_streams`, `use_streams`, `num_streams`
- `brief_runs`: short runs of the backbone that examine it

May import: `parscale.kernels`, `distributed`, `config`, `compat`, `errors`.
"""
