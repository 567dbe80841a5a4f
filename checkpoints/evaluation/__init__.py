"""What a model is worth: its loss on text, lm-eval's tasks, differences with intervals, streams apart."""
