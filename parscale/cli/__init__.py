"""The command line: each command is a thin layer over a public Python function.

Until a command runs, no module here imports torch, transformers or a package that imports them, so help is fast.
"""

from parscale.cli.application import app, main

__all__ = ["app", "main"]
