"""What several nodes have to have in common: the output folder, which all of them write to, and the data."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from parscale.checkpoints.texts.files import printable_path


def require_shared_folder(folder: Path, state: PartialState) -> None:
    """Checks that every process finds what the main process writes; all of them call this together.

    Args:
        folder: the output; it need not exist.
        state: of the processes.

    Raises:
        ValueError: a process finds another folder under this path.
    """
    if state.num_processes == 1:
        return
    with _marker(folder) if state.is_main_process else contextlib.nullcontext() as path:
        place: list[Any] = [path]
        broadcast_object_list(place)
        seen = gather_object([place[0].is_file()])
    if not all(seen):
        raise ValueError(
            f"The output folder {printable_path(folder)} is not the same on all nodes; give one on a shared file "
            "system, by a path that leads to it on each of them."
        )


def require_same_data(digests: Mapping[str, str], state: PartialState) -> None:
    """Checks that every process has read the same; all of them call this together.

    Args:
        digests: of each text, by the name that an error gives it.
        state: of the processes.

    Raises:
        ValueError: a process has read another text, or has it under another name.
    """
    if state.num_processes == 1:
        return
    read: list[dict[str, str]] = gather_object([dict(digests)])
    for name in dict.fromkeys(name for texts in read for name in texts):
        others = [str(process) for process, texts in enumerate(read) if texts.get(name) != read[0].get(name)]
        if others:
            raise ValueError(
                f"The {name} of process {', '.join(others)} is not that of process 0; give files of the same contents "
                "on all nodes, under the same names."
            )


@contextlib.contextmanager
def _marker(folder: Path) -> Iterator[Path]:
    """A file in the folder, or where it will be, that is gone after the block; its path begins as the folder's."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    with tempfile.NamedTemporaryFile(dir=existing, prefix=".parscale-") as file:
        yield existing / Path(file.name).name
