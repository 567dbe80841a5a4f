"""Checkpoints on disk: full ones, streams only, and the plain models that they are made of.

- `untrusted`: JSON that nobody vouches for
- `headers`: the head of a safetensors file
- `folders`: the files of a checkpoint, and what its configuration says
- `values`: whether a model can have such numbers
- `packed`: how many parameters quantized tensors stand for, in files
- `counting`: the same in memory
- `architectures`: what a full checkpoint calls its class, for transformers
- `checks`: whether the parts of a checkpoint fit each other
- `pretrained`: the one way to `from_pretrained`
- `models`: plain models and backbones, read
- `stored_sets`: sets of streams, read
- `working`: working folders, locked by the process that writes in them
- `staging`: folders and files that change as a whole
- `saving`: full checkpoints and streams, written

`parscale.load` itself is in `parscale.loading`, above `parscale.wrapping`.
May import: `hooks`, `terminal` and what is below them.
"""
