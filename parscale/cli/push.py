"""`parscale push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parscale.cli.options import Json, Private
from parscale.cli.output import print_figures, print_json, quiet_libraries, waiting


def push(
    folder: Annotated[Path, typer.Argument(help="A trained checkpoint's folder, with its model card.")],
    repository: Annotated[str, typer.Argument(help="The repository's name on the Hub; made if there is none.")],
    private: Private = None,
    json: Json = False,
) -> None:
    """Upload a trained checkpoint with its card to the Hugging Face Hub."""
    from parscale.checkpoints.training.upload import push as upload

    quiet_libraries()
    with waiting(f"Uploading {folder}"):
        address = upload(folder, repository, private=private)
    (print_json if json else print_figures)({"folder": str(folder), "uploaded_to": address})
