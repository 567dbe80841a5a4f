"""Moves of files into a folder, which a kill at any time leaves so that they can be ended or undone.

A working folder holds the new files in `NEW`. First the old files move away, into `LEAVING`. Then `LEAVING` is renamed
to `OLD`, and the new files move in. So `LEAVING` tells that no new file is in its place yet: the old ones can move
back. `OLD` tells that all old files are away: the other new ones can move in. Sets of streams have no such names.

While files move, none of those still to come has its name in the folder. A file that has is somebody's newer one: moves
that were cut off are not ended over it. `LAST` has the names of the files to move last.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from parscale.format.untrusted import brief

NEW, LEAVING, OLD, LAST = "new", ".leaving", ".old", ".last"
_WINDOWS = os.name == "nt"


def move_into(target: Path, folder: Path, last: Sequence[str], replaced: Iterable[str]) -> None:
    """Moves all files below `NEW` in a working folder into an existing folder; on failure, all moves are undone.

    On disk this has four steps: old files of `last` move away, then the other old ones; the new files move in, and at
    the end those of `last`.

    Args:
        target: the existing folder.
        folder: its working folder.
        last: names of files, relative to the target.
        replaced: names of old files that must not stay with the new ones.

    Raises:
        OSError: a file cannot be moved.
    """
    new = _files(folder / NEW)
    for name in new:
        _require_place(target, name)
    old = [name for name in new if os.path.lexists(target / name)]
    old += [name for name in replaced if name not in new]
    (folder / LAST).write_text("\n".join(last), encoding="utf-8")
    flush(folder / LAST)
    made: list[Path] = []
    try:
        (folder / LEAVING).mkdir()
        flush(folder)
        _move_out(target, folder / LEAVING, old, last)
        _rename(folder / LEAVING, OLD)
        _move_in(folder / NEW, target, new, last, made)
    except BaseException as error:
        _undo(target, folder, new, last, made, error)
        raise
    _rename(folder / OLD, "replaced")  # from now on it can be deleted
    for place in {(target / name).parent for name in old} - {target}:
        with contextlib.suppress(OSError):  # not empty
            place.rmdir()


def cut_off(folder: Path) -> Path | None:
    """In a working folder whose moves were cut off, the folder with the files still to move; otherwise `None`."""
    if _is_folder(folder / OLD):
        return folder / NEW
    return folder / LEAVING if _is_folder(folder / LEAVING) else None


def still_to_move(folder: Path) -> list[str]:
    """In a working folder, the names of the files that moves which were cut off have left to move."""
    source = cut_off(folder)
    return _files(source) if source is not None and _is_folder(source) else []


def end_moves(target: Path, folder: Path) -> None:
    """Ends moves that were cut off, so that the files of the target are all old or all new; no file is replaced.

    Args:
        target: the folder that the files belong to.
        folder: its working folder, which no process uses.

    Raises:
        FileExistsError: the target has a file of the same name as one to move, which somebody else wrote meanwhile.
        OSError: a file cannot be moved; nothing is lost, and the next call goes on.
    """
    source = cut_off(folder)
    if source is None:
        return
    names = still_to_move(folder)
    for name in names:
        _require_place(target, name)
    newer = [name for name in names if os.path.lexists(target / name)]
    if newer:
        raise FileExistsError(
            errno.EEXIST,
            f"has files of a save that was cut off, but {target} has newer ones of the same names "
            f"({brief(', '.join(newer))}), which are not replaced: move those elsewhere for the files of that save, or "
            "delete this folder to go on without them",
            str(folder),
        )
    last = (folder / LAST).read_text(encoding="utf-8").splitlines() if (folder / LAST).is_file() else []
    _move_in(source, target, names, last)
    for done in (OLD, LEAVING):
        if _is_folder(folder / done):
            _rename(folder / done, "replaced")


def flush(path: Path) -> None:
    """Flushes the buffers of a file, or the names in a folder, to disk.

    Windows flushes files that are open for writing alone, and opens no folders: names are not flushed there.
    """
    if _WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _undo(
    target: Path, folder: Path, new: Sequence[str], last: Sequence[str], made: Sequence[Path], error: BaseException
) -> None:
    """Moves new files out of the target and old ones back, and removes the folders that were made there.

    Raises:
        OSError: a file cannot be moved.
    """
    try:
        _move_out(target, folder / NEW, [name for name in new if not os.path.lexists(folder / NEW / name)], last)
        if (folder / OLD).is_dir():
            _rename(folder / OLD, LEAVING)
        end_moves(target, folder)
    except OSError as failure:
        raise OSError(
            f"{error}; and the older files could not be moved back ({failure}): they are in {folder}, and the next "
            "save here begins with them."
        ) from error
    for place in reversed(made):
        with contextlib.suppress(OSError):
            place.rmdir()


def _move_out(target: Path, place: Path, names: Sequence[str], last: Sequence[str]) -> None:
    """Moves files out of the target, first those that move in last."""
    _move(target, place, [name for name in reversed(last) if name in names])
    _move(target, place, [name for name in names if name not in last])


def _move_in(
    source: Path, target: Path, names: Sequence[str], last: Sequence[str], made: list[Path] | None = None
) -> None:
    """Moves files into the target, those of `last` at the end."""
    _move(source, target, [name for name in names if name not in last], made)
    _move(source, target, [name for name in last if name in names], made)


def _move(source: Path, target: Path, names: Sequence[str], made: list[Path] | None = None) -> None:
    """Moves files to the same places in another folder, and flushes all folders that change.

    Args:
        source: the folder that they are in.
        target: the other folder.
        names: of the files, relative to the folder.
        made: gets the folders that are created.
    """
    made = [] if made is None else made
    for name in names:
        made += _make_folders((target / name).parent)
        os.replace(source / name, target / name)
    places = {(folder / name).parent for name in names for folder in (source, target)}
    for place in sorted(places | {place.parent for place in made}):
        flush(place)


def _rename(folder: Path, name: str) -> None:
    os.rename(folder, folder.with_name(name))
    flush(folder.parent)


def _require_place(target: Path, name: str) -> None:
    """Checks that a file is not written through a link or in place of something that is not a file."""
    for part in reversed(Path(name).parents[:-1]):
        place = target / part
        if os.path.lexists(place) and (place.is_symlink() or not place.is_dir()):
            what = "a link, through which nothing is written" if place.is_symlink() else "not a folder"
            raise OSError(f"Nothing was saved: {place} should be a folder, but is {what}; move it elsewhere.")
    place = target / name
    if place.is_dir() and not place.is_symlink():
        raise OSError(f"Nothing was saved: {place} should be a file, but is a folder; move it elsewhere.")


def _make_folders(folder: Path) -> list[Path]:
    """Creates a folder and its parents; returns the ones that did not exist."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()][::-1]
    for place in missing:
        place.mkdir()
    return missing


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _files(folder: Path) -> list[str]:
    """The names of all files below a folder, including links."""
    found = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found += [Path(place, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)
