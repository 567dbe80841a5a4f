"""The prefix in attention, and the layers that take one.

- `registered`: the attention function that transformers' layers look up
- `cache_seam`: layers that look up none: their cache puts the prefix in front
- `flash`: the prefix under flash-attention
- `functions`: what these have in common
- `masks`: room for the prefix in masks
- `positions`: positions of left-padded texts
- `rotary`: tables of sines and cosines
- `caches`: the caches that callers hand a backbone
- `discovery`: finds the layers, by running the backbone briefly

May import: `streams` and what is below it.
"""
