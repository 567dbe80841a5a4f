"""Folders and files that change completely or not at all.

Everything is written in a working folder next to its destination (`parscale.format.working`), flushed to disk, and then
moved; the destination folders are flushed too. So neither a kill nor a power failure leaves incomplete files under
their final names, and a failed write changes nothing. After a kill while files move, the next write to the same place
first ends or undoes the moves (`parscale.format.moving`).

**Links.** A link that is itself the output is followed: the user named its target. A broken link raises an error.
Inside a folder nothing is written through a link: a link in place of a file is replaced by the file, and its target
stays; a link in place of a sub-folder raises an error.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from parscale.format.moving import NEW, flush, move_into, still_to_move
from parscale.format.working import is_working_folder, working, working_folder

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a full disk
PLOT_ENDINGS = (".png", ".pdf", ".svg")

# The working folders of the open blocks, and the destinations of their files.
_FINAL_PATHS: contextvars.ContextVar[Mapping[Path, Path]] = contextvars.ContextVar(
    "final_paths", default=MappingProxyType({})
)


@contextlib.contextmanager
def staged(
    save_directory: str | os.PathLike[str],
    *,
    last: str | Sequence[str],
    replaces: Callable[[str], bool] = lambda name: False,
    new: bool = False,
) -> Iterator[Path]:
    """A folder whose files move to `save_directory` at the end of the block; on failure, nothing changes.

    An existing folder keeps its other files. If nothing was written in the block, nothing happens. Moves of an earlier
    save that were cut off are ended before the block, which can then judge what the folder holds.

    Args:
        save_directory: created if it does not exist, with its parent folders.
        last: the file without which readers ignore the folder; it is removed first and moved in last. If there are
            several, the last of them is moved in last.
        replaces: whether an old file of this name, relative to the folder, must be removed for the new ones.
        new: raise an error for a folder that is not empty, also if it was filled while the block ran.

    Raises:
        ValueError: with `new`, as in `require_new_folder`.
        NotADirectoryError: `save_directory` is a file.
        FileExistsError: it was filled while the block ran, or since an earlier save was cut off (`end_moves`).
        OSError: it cannot be written, another process is writing to it, or the disk is full.
    """
    target = folder_to_write(save_directory)
    with _explained(target), _folders_above(target), _working_at(target) as folder:
        if new:
            require_new_folder(target)
        work = folder / NEW
        work.mkdir()
        known = _FINAL_PATHS.set({**_FINAL_PATHS.get(), work: final_path(target)})
        try:
            yield work
        finally:
            _FINAL_PATHS.reset(known)
        if not any(work.iterdir()):
            return
        _flush_all(work)
        if new:
            require_new_folder(target)
        if folder.parent == target:
            replaced = filter(replaces, _files_nearby(target))
            move_into(target, folder, [last] if isinstance(last, str) else last, replaced)
        elif holds_something(target):
            raise FileExistsError(
                errno.EEXIST, "did not exist and was filled while files for it were written; save again", str(target)
            )
        else:
            os.rename(work, target)
            flush(target.parent)


def final_path(path: str | os.PathLike[str]) -> Path:
    """The path of a file after the end of all open `staged` blocks; a path outside of their folders stays the same."""
    path = Path(os.path.abspath(path))
    final_paths = _FINAL_PATHS.get()
    above = next((folder for folder in (path, *path.parents) if folder in final_paths), None)
    return path if above is None else final_paths[above] / path.relative_to(above)


@contextlib.contextmanager
def staged_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path of the same name to write to; the file moves to `path` at the end of the block.

    Raises:
        ValueError: as in `file_to_write`.
        OSError: it cannot be written, or another process is writing it.
    """
    target = file_to_write(path)
    with _working_beside(target, path) as folder:
        yield folder / target.name
        flush(folder / target.name)
        os.replace(folder / target.name, target)
        flush(target.parent)


# -- checks before any work


def folder_to_write(path: str | os.PathLike[str]) -> Path:
    """The real path of a folder to write to; it need not exist.

    Raises:
        ValueError: it is empty, which `os.path` takes for the current folder.
        NotADirectoryError: it is not a folder, or a broken link.
    """
    if not os.fspath(path):
        raise ValueError("The folder to write has an empty name: give one, or '.' for the current folder.")
    target = Path(os.path.abspath(path))
    if target.is_symlink() and not target.exists():
        raise NotADirectoryError(
            f"{target} is a link to {os.readlink(target)}, which does not exist: make that folder."
        )
    if target.exists() and not target.is_dir():
        what = "a file" if target.is_file() else "neither a folder nor a file"
        raise NotADirectoryError(f"{target} is {what}: give a folder to save in.")
    return Path(os.path.realpath(target))


def require_new_folder(output: str | os.PathLike[str]) -> None:
    """Checks that an output folder is empty or does not exist; leftovers of a killed process do not count.

    Files that were moving when their process was killed do count: they are somebody's.

    Raises:
        ValueError: it is not a folder, or not empty.
    """
    path = Path(output)
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"The output {output} is a link to {os.readlink(path)}, which does not exist; make that folder, or give "
            "another one."
        )
    if path.exists() and not path.is_dir():
        what = "a file" if path.is_file() else "neither a folder nor a file"
        raise ValueError(f"The output {output} is {what}; give a folder that is new or empty.")
    if holds_something(path):
        work = working_folder(path)
        hidden = f" A save there was cut off, and {work} has files of it." if still_to_move(work) else ""
        raise ValueError(f"The output folder {output} is not empty; give a new one, or empty it.{hidden}")


def holds_something(folder: Path) -> bool:
    """Whether a folder exists and holds more than working folders, or one with files still to move."""
    if not folder.is_dir():
        return False
    return not all(is_working_folder(entry) and not still_to_move(entry) for entry in folder.iterdir())


def require_writable_folder(output: str | os.PathLike[str]) -> None:
    """Tests whether a folder can be written to, and leaves nothing behind.

    Raises:
        OSError: it cannot be written to, another process is writing to it, or it was filled since a save there was cut
            off (`end_moves`).
    """
    target = folder_to_write(output)
    with _explained(target), _folders_above(target), _working_at(target):
        pass


def file_to_write(path: str | os.PathLike[str]) -> Path:
    """The real path of a file to write; it need not exist.

    Raises:
        ValueError: it is a folder, not a regular file, or a broken link.
    """
    given = Path(path)
    if given.is_symlink() and not given.exists():
        raise ValueError(f"{path} is a link to {os.readlink(given)}, which does not exist; give a file to write.")
    if given.is_dir():
        raise ValueError(f"{path} is a folder; give a file to write.")
    if given.exists() and not given.is_file():
        raise ValueError(f"{path} is a device or a pipe; give a file to write.")
    return Path(os.path.realpath(given))


def require_writable(path: str | os.PathLike[str]) -> None:
    """Tests whether a file can be written, and leaves nothing behind.

    Raises:
        ValueError: as in `file_to_write`, or its folder does not exist.
        OSError: nothing can be written in its folder, or another process is writing it.
    """
    target = file_to_write(path)
    if not target.parent.is_dir():
        raise ValueError(f"There is no folder {Path(path).parent} to put {target.name} in; make it first.")
    with _working_beside(target, path):
        pass


def require_plot_path(path: str | os.PathLike[str]) -> None:
    """Tests whether a plot can be written, in a format that its suffix sets, and leaves nothing behind.

    Raises:
        ValueError: the suffix is not one of `PLOT_ENDINGS`, or as in `require_writable`.
        OSError: as in `require_writable`.
    """
    if Path(path).suffix.lower() not in PLOT_ENDINGS:
        raise ValueError(f"{path} must end in one of {', '.join(PLOT_ENDINGS)}, which set the format.")
    require_writable(path)


# -- moving


def _flush_all(folder: Path) -> None:
    """Flushes a folder and everything below it."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            if not Path(place, name).is_symlink():
                flush(Path(place, name))
        flush(Path(place))


@contextlib.contextmanager
def _folders_above(target: Path) -> Iterator[None]:
    """In this block the parent folders of `target` exist; those created here that stay empty are removed again."""
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
        yield
        for folder in missing if target.exists() else ():
            flush(folder.parent)
    finally:
        with contextlib.suppress(OSError):  # not empty
            for folder in missing:
                folder.rmdir()


def _working_at(target: Path) -> contextlib.AbstractContextManager[Path]:
    """The working folder of an output: inside the output if it exists, since it may be on another disk."""
    return working(target) if target.is_dir() else working(target.parent, target.name)


@contextlib.contextmanager
def _working_beside(target: Path, path: str | os.PathLike[str]) -> Iterator[Path]:
    """The working folder of a file; an error about it names the path that was given."""
    try:
        with working(target.parent, target.name) as folder:
            yield folder
    except OSError as error:
        if error.errno is None or not _is_about(error, target):
            raise
        raise type(error)(error.errno, f"cannot be written ({error.strerror})", os.fspath(path)) from error


def _files_nearby(folder: Path) -> list[str]:
    """The names of the files in a folder and in its direct sub-folders, including links."""
    names = []
    for entry in sorted(folder.iterdir()):
        is_folder = entry.is_dir() and not entry.is_symlink()
        try:
            paths = sorted(entry.iterdir()) if is_folder and not is_working_folder(entry) else [entry]
        except PermissionError:  # somebody else's
            continue
        names += [path.relative_to(folder).as_posix() for path in paths if path.is_file() or path.is_symlink()]
    return names


# -- errors


def disk_error(error: BaseException) -> int | None:
    """The error number of the operating system, also if a library in Rust reports it as another type."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return None if found is None else int(found[1])


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Adds to an error which folder could not be written, and why."""
    try:
        yield
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, error.strerror, str(target)) from error
    except FileExistsError:  # has a complete message
        raise
    except Exception as error:
        code = disk_error(error)
        if code is None or not _is_about(error, target):
            raise
        remedy = "free some space or give another folder" if code in DISK_FULL else "give a folder that can be written"
        raise OSError(code, f"Nothing was saved: {os.strerror(code)}; {remedy}", str(target)) from error


def _is_about(error: Exception, target: Path) -> bool:
    """Whether an error is about an output, its working folder or a parent folder, as far as the error names a path."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str):
        return True
    place = Path(os.path.realpath(name))
    return target.is_relative_to(place) or any(
        place.is_relative_to(folder) for folder in (target, working_folder(target.parent, target.name))
    )
