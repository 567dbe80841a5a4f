"""Checkpoints on disk: names, headers, folders, checks, saving and loading."""
