"""`parscale info`."""

from __future__ import annotations

from parscale.cli.options import Checkpoint, Json
from parscale.cli.output import print_figures, print_json, quiet_hub


def info(checkpoint: Checkpoint, json: Json = False) -> None:
    """Describe a checkpoint: backbone, streams, sizes, how it was made.

    Reads headers, not weights; of a name on the Hub, downloads the files.
    """
    from parscale.checkpoints.description import describe

    quiet_hub()
    (print_json if json else print_figures)(describe(checkpoint))
