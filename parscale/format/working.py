"""Working folders: hidden folders in which one process writes files before they move to their destination.

A working folder holds the file `MARKER`, which its process keeps locked. The lock ends with the process, even if it is
killed; the folder is then a leftover, and the next process at this place removes it, after it has ended moves that were
cut off. A folder without the marker belongs to someone else, whatever its name, and is not touched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where no file is locked
    fcntl = None  # type: ignore[assignment]

from parscale.format.moving import cut_off, end_moves

SUFFIX = ".parscale-working"
MARKER = "made-by-parscale"
_MARKS = (
    b"A process of parscale writes in this folder. Once none does, the folder can be deleted, unless it holds .leaving "
    b"or .old:\nthen files were moving, and the next process that writes to the same place moves the others.\n"
)
BUSY = "another process is writing there; wait until it has ended, or give another place"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_ATTEMPTS = 10


@contextlib.contextmanager
def working(place: Path, name: str = "") -> Iterator[Path]:
    """Creates the working folder `.NAME.parscale-working` in `place`, and removes it after the block.

    It stays if files in it could be neither moved to their places nor back.

    Args:
        place: an existing folder, on the disk of the destination.
        name: of the output, so that no two processes write the same output at one time.

    Raises:
        BlockingIOError: another process is working there.
        FileExistsError: something else has this name, or moves that were cut off cannot be ended (`end_moves`).
        OSError: nothing can be written in `place`.
    """
    folder = working_folder(place, name)
    marker = _claim(folder)
    try:
        clear(folder)
        yield folder
    finally:
        with _closing(marker), contextlib.suppress(OSError):
            if cut_off(folder) is None:
                _remove(folder)


def working_folder(place: Path, name: str = "") -> Path:
    """The path of the working folder of `working`."""
    return place / (f".{name}{SUFFIX}" if name else SUFFIX)


def lock(file: int, path: Path) -> None:
    """Locks an open file for this process.

    Args:
        file: its descriptor, open for writing.
        path: for the error message.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(errno.EBUSY, BUSY, str(path)) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"The file system of {path} has no locks: do not let a second process write there.", stacklevel=3)


def is_working_folder(folder: Path) -> bool:
    """Whether a folder has the marker, or may have been left by a kill before the marker was written."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        return (folder / MARKER).is_file() or (folder.name.endswith(SUFFIX) and not any(folder.iterdir()))
    except PermissionError:  # somebody else's, such as the folder lost+found of a disk
        return False


def remove_leftovers(folder: Path) -> None:
    """Removes the working folders in `folder` whose processes have ended."""
    for entry in folder.iterdir():
        if is_working_folder(entry):
            with contextlib.suppress(BlockingIOError), _closing(_claim(entry)):
                _remove(entry)


def clear(folder: Path) -> None:
    """Empties a working folder, except for its marker. Targets of links are not touched."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARKER:
            entry.unlink()


def _remove(folder: Path) -> None:
    """Removes a folder, the marker last, so that a folder left by a kill is still known as a working folder."""
    clear(folder)
    (folder / MARKER).unlink(missing_ok=True)
    folder.rmdir()


@contextlib.contextmanager
def _closing(marker: int) -> Iterator[None]:
    """Closes the marker of a folder that is removed in the block: after it, so that the folder stays locked.

    Where nothing is locked it is closed before the block: Windows removes no file that is open.
    """
    if fcntl is None:
        os.close(marker)
    try:
        yield
    finally:
        if fcntl is not None:
            os.close(marker)


def _claim(folder: Path) -> int:
    """Creates a working folder, or takes over a leftover and ends its moves; returns the locked marker."""
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        _require_ours(folder)
        try:
            marker = os.open(folder / MARKER, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its process has just removed it
            continue
        try:
            lock(marker, folder)
            if _is_at(folder / MARKER, marker):
                end_moves(_destination(folder), folder)
                _write_marks(folder, marker)
                return marker
        except BaseException:
            os.close(marker)
            raise
        os.close(marker)
    raise BlockingIOError(errno.EBUSY, BUSY, str(folder))


def _destination(folder: Path) -> Path:
    """What is written in a working folder: the inverse of `working_folder`."""
    return folder.parent / folder.name.removesuffix(SUFFIX).removeprefix(".")


def _write_marks(folder: Path, marker: int) -> None:
    try:
        os.ftruncate(marker, 0)
        os.write(marker, _MARKS)
    except OSError:  # the disk is full
        with contextlib.suppress(OSError):
            _remove(folder)
        raise


def _require_ours(folder: Path) -> None:
    """Raises an error for a folder that only has the name of a working folder."""
    with contextlib.suppress(FileNotFoundError):
        if not is_working_folder(folder):
            raise FileExistsError(
                errno.EEXIST, "is in the way and was not made by parscale; move it elsewhere", str(folder)
            )


def _is_at(path: Path, file: int) -> bool:
    """Whether an open file is still the file at a path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
