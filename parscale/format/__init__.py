"""Checkpoints on disk: full ones, streams only, and the plain models that they are based on.

- `untrusted`: JSON from untrusted files
- `headers`: the header of a safetensors file
- `folders`: the files of a checkpoint, and its configuration
- `values`: checks that the numbers in a configuration are possible
- `packed`: the number of parameters in quantized tensors, in files
- `counting`: the same in memory
- `architectures`: the class names of full checkpoints, for transformers
- `checks`: checks that the parts of a checkpoint fit each other
- `pretrained`: the only caller of `from_pretrained`
- `models`: loads plain models and backbones
- `stored_sets`: loads sets of streams
- `working`: working folders, locked by the process that writes in them
- `moving`: moves files into a folder so that a kill loses none
- `staging`: folders and files that change completely or not at all
- `repository`: repositories on the Hub that checkpoints are uploaded to
- `saving`: saves full checkpoints and streams

`parscale.load` itself is in `parscale.loading`, above `parscale.wrapping`.
May import: `hooks`, `terminal` and what is below them.
"""
