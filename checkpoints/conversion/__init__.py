"""Converts a model's checkpoint into one with parallel streams."""
