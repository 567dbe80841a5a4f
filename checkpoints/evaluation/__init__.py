"""Evaluation: loss on text, lm-eval's tasks, paired differences with intervals, the streams one by one."""
