"""Adds the prefix to attention, and finds the attention layers.

- `registered`: the attention function that transformers' layers look up
- `cache_seam`: layers without that lookup: their cache adds the prefix
- `flash`: the prefix with flash-attention
- `shared`: streams that share the keys and values of stream 0
- `projections`: these projected and cached for stream 0 alone
- `grouped`: attention without repeated keys and values, for exported graphs
- `functions`: the common parts of these
- `masks`: room for the prefix in masks, and the parts of them that streams need
- `positions`: positions of left-padded texts
- `rotary`: tables of sines and cosines
- `caches`: the caches that callers pass to a backbone
- `discovery`: finds the attention layers by a short run of the backbone

May import: `streams` and what is below it.
"""
