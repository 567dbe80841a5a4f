"""The build backend: setuptools', whose archives are then written anew so that the same source gives the same bytes.

setuptools copies the times, the modes and, into the source distribution, the owner that files have where it runs. Here
every member has the time of `SOURCE_DATE_EPOCH` (a standard of reproducible builds; without it, 1980, the earliest
that a wheel can say), the mode 644, or 755 for folders, and no owner, and members are in the order of their names.
"""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

EARLIEST = 315_532_800  # 1980-01-01


def build_wheel(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | os.PathLike[str] | None = None
) -> str:
    """As setuptools', reproducible; returns the file's name."""
    name = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    rewrite_zip(Path(wheel_directory, name))
    return name


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    """As setuptools', reproducible; returns the file's name."""
    name = build_meta.build_sdist(sdist_directory, config_settings)
    rewrite_tar(Path(sdist_directory, name))
    return name


def rewrite_zip(path: Path) -> None:
    """Writes a zip archive anew, with nothing in it of where and when it was made."""
    when = time.gmtime(_epoch())[:6]
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    last = [name for name in contents if ".dist-info/" in name]  # as the format advises
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in [*sorted(contents.keys() - last), *sorted(last)]:
            member = zipfile.ZipInfo(name, when)
            member.external_attr = (stat.S_IFREG | 0o644) << 16
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, contents[name])


def rewrite_tar(path: Path) -> None:
    """Writes a `.tar.gz` archive anew, with nothing in it of where and when it was made."""
    with tarfile.open(path) as archive:
        members = {member.name: (member, archive.extractfile(member)) for member in archive}
        contents = {name: (member.isdir(), file.read() if file else b"") for name, (member, file) in members.items()}
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", mtime=_epoch(), fileobj=raw) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, (is_folder, data) in sorted(contents.items()):
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if is_folder else tarfile.REGTYPE
            member.mode, member.mtime, member.size = (0o755 if is_folder else 0o644), _epoch(), len(data)
            archive.addfile(member, None if is_folder else io.BytesIO(data))


def _epoch() -> int:
    return max(EARLIEST, int(os.environ.get("SOURCE_DATE_EPOCH", EARLIEST)))
