"""The sets of streams of a model: what they are, which one runs and trains, and how they are mixed."""
