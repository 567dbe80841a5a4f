"""The prefix in attention: where it is put, which layers take it, masks, positions and caches."""
