"""A model's checkpoint becomes one with parallel streams."""
