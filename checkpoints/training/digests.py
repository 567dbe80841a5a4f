"""Digests of what a run reads: a resumed run must read the same contents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from parscale.checkpoints.texts.order import FILES_AT_ONCE, SHUFFLE_BUFFER, SHUFFLE_CHARACTERS
from parscale.checkpoints.training.new_model import NewModel
from parscale.config import SETS
from parscale.format.folders import CONFIG, STREAMS_CONFIG, STREAMS_FILE, STREAMS_ONLY, Checkpoint, backbone_location

_PICKLE = "pytorch_model.bin"  # the weights of a backbone that has no other format


def checkpoint_digest(name: str | NewModel) -> str:
    """A digest of the configuration and the weights of a checkpoint, with the backbone that streams alone name.

    Args:
        name: a folder, a name on the Hugging Face Hub, or a new model, which has no weights yet.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: the checkpoint is damaged.
    """
    if isinstance(name, NewModel):
        return name.digest()
    digest = hashlib.sha256()
    for path in _files(Checkpoint(name)):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _files(checkpoint: Checkpoint) -> Iterator[Path]:
    """The files that loading a checkpoint reads, in a fixed order."""
    if checkpoint.kind() == STREAMS_ONLY:
        yield from _existing_files(checkpoint, STREAMS_CONFIG, STREAMS_FILE)
        backbone = backbone_location(checkpoint, checkpoint.read_json(STREAMS_CONFIG))
        if backbone is not None:
            yield from _files(Checkpoint(backbone))
        return
    yield from _existing_files(checkpoint, CONFIG)
    try:
        weights = checkpoint.weights()
    except (FileNotFoundError, ValueError):
        yield from _existing_files(checkpoint, _PICKLE)
    else:
        yield from sorted({tensor.file for tensor in weights.values()}, key=lambda path: path.name)
    for name in checkpoint.read_json(CONFIG).get(SETS, []):
        yield from _existing_files(checkpoint.inside(name), STREAMS_CONFIG, STREAMS_FILE)


def _existing_files(checkpoint: Checkpoint, *names: str) -> Iterator[Path]:
    return (path for name in names if (path := checkpoint.file(name)) is not None)


def streamed_digest(beginning: str, sources: Sequence[str]) -> str:
    """A digest of streamed data: of its beginning, of the sizes of the local files, and of what orders the rest.

    Args:
        beginning: a digest of the first rows.
        sources: the names that the user gave to the data.
    """
    order = f"{FILES_AT_ONCE} {SHUFFLE_BUFFER} {SHUFFLE_CHARACTERS}"
    digest = hashlib.sha256(f"{beginning} in turn {order}\n".encode())
    for source in map(Path, sources):
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.is_file():
                digest.update(f"{os.path.relpath(path, source)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()
