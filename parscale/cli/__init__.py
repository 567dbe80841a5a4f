"""The command line: each command is a thin layer over a function that programs can call as well.

No module here imports torch, transformers or anything that does until a command runs, so that help is immediate.
"""

from parscale.cli.application import app, main

__all__ = ["app", "main"]
