"""Folders that change as a whole: everything is written beside its place first, and then moved there."""

from __future__ import annotations

import contextlib
import contextvars
import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from safetensors import SafetensorError

# The working folders of the blocks that are open, and where their files go.
_PLACES: contextvars.ContextVar[Mapping[Path, Path]] = contextvars.ContextVar("places", default=MappingProxyType({}))


@contextlib.contextmanager
def staged(
    save_directory: str | os.PathLike[str], *, last: str, replaces: Callable[[str], bool] = lambda name: False
) -> Iterator[Path]:
    """A working folder whose files move to ``save_directory`` when the block ends; if it fails, nothing changes.

    A folder that exists keeps its other files. If nothing was written in the block, nothing happens.

    Args:
        save_directory: made if it does not exist, with the folders above it.
        last: the file without which a reader takes the folder for none; it leaves first and comes last.
        replaces: whether an old file of this name, relative to the folder, has no place beside the new ones.

    Raises:
        NotADirectoryError: ``save_directory`` is a file.
        OSError: it cannot be written, or the disk is full.
    """
    target = Path(os.path.abspath(save_directory))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file: give a folder to save in.")
    beside = target if target.is_dir() else next(folder for folder in target.parents if folder.exists())
    work = beside / f".{target.name}-{uuid.uuid4().hex[:8]}"
    known = _PLACES.set({**_PLACES.get(), work: final_place(target)})
    try:
        with _explained(target):
            work.mkdir()
        with _explained(target):
            yield work
        with _explained(target):
            if target.is_dir():
                _move_into(work, target, last, replaces)
            elif any(work.iterdir()):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.rename(work, target)
    finally:
        _PLACES.reset(known)
        shutil.rmtree(work, ignore_errors=True)


def final_place(path: str | os.PathLike[str]) -> Path:
    """Where a path will be once no :func:`staged` block is open any more: outside of their folders, where it is."""
    path = Path(os.path.abspath(path))
    places = _PLACES.get()
    above = next((folder for folder in (path, *path.parents) if folder in places), None)
    return path if above is None else places[above] / path.relative_to(above)


def _move_into(work: Path, target: Path, last: str, replaces: Callable[[str], bool]) -> None:
    new = sorted(_files(work), key=lambda name: name == last)
    if not new:
        return
    kept_out = {work.name} if work.parent == target else set()
    old = [name for name in _files(target, kept_out) if name in new or replaces(name)]
    old.sort(key=lambda name: name != last)
    away = work / f".old-{uuid.uuid4().hex[:8]}"
    moves = [(target / name, away / name) for name in old] + [(work / name, target / name) for name in new]
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in moves:
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            os.replace(destination, source)
        raise
    for folder in {(target / name).parent for name in old} - {target}:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def _files(folder: Path, without: Collection[str] = ()) -> list[str]:
    """Names of the files in a folder and in its direct sub-folders."""
    paths = [path for entry in sorted(folder.iterdir()) if entry.name not in without for path in _with_contents(entry)]
    return [path.relative_to(folder).as_posix() for path in paths if path.is_file() or path.is_symlink()]


def _with_contents(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() and not path.is_symlink() else [path]


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Says which folder could not be written, and why, also for errors that a library reports as another type."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise _explanation(target, int(code[1])) from error
    except OSError as error:
        if error.errno is None:
            raise
        raise _explanation(target, error.errno) from error


def _explanation(target: Path, code: int) -> OSError:
    remedy = "free some space or give another folder" if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
    return OSError(
        code, f"Nothing was saved: {os.strerror(code)}; {remedy or 'give a folder that can be written'}", str(target)
    )
