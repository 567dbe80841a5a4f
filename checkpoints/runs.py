"""The folder of a training run: what it was started with, its checkpoints, and the metrics that it has written.

========================== ==========================================================================================
`run.json`                 what the run was started with; going on with other settings is refused
`metrics.jsonl`            one line for each step, and for each text that was measured
`checkpoint-N`             what going on needs after N steps, with `manifest.json`: its files, their sizes and checksums
`training.json`            the report, written when the run has ended and the model stands in the folder
========================== ==========================================================================================

A checkpoint is written under another name, flushed to the disk, and moved to its place when it is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parscale.writing import staged

RUN, METRICS, REPORT, MANIFEST = "run.json", "metrics.jsonl", "training.json", "manifest.json"
SAVING, REMOVING = ".saving", ".removing"  # names of folders that a killed run leaves behind
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_CHUNK = 1 << 22


class Run:
    """A run's folder.

    Args:
        folder: where; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self, *, resume: bool) -> None:
        """Refuses a folder that is in use.

        Raises:
            ValueError: it is a file, or holds something and `resume` is not set.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"The output {self.folder} is a file; give a folder that is new or empty.")
        if not resume and self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(
                f"The output folder {self.folder} is not empty; give a new one, or --resume to go on with its run."
            )

    def begin(self, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Makes the folder and writes down what the run is started with, or checks that it goes on with the same.

        Raises:
            ValueError: the folder is in use, or the run in it was started with other settings.
        """
        self.check(resume=resume)
        settings = json.loads(json.dumps(settings))
        occupied = self.folder.is_dir() and any(self.folder.iterdir())
        path = self.folder / RUN
        if occupied and path.is_file():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is damaged ({error}); start in a new folder.") from error
            changed = [key for key in settings | before if _placed(settings.get(key)) != _placed(before.get(key))]
            if changed:
                found = "; ".join(f"{key} was {before.get(key)!r} and is {settings.get(key)!r}" for key in changed)
                raise ValueError(f"The run in {self.folder} was started with other settings: {found}.")
        elif occupied and not all(_is_leftover(entry) for entry in self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds no run to go on with (it has no {RUN}); give a new folder.")
        else:
            with staged(self.folder, last=RUN) as work:
                (work / RUN).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for entry in self.folder.iterdir():
            if _is_leftover(entry):
                shutil.rmtree(entry, ignore_errors=True)

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint of the most steps that is whole, if there is one; warns of each newer one that is not."""
        if not self.folder.is_dir():
            return None
        for step in sorted(self.steps(), reverse=True):
            path = self.checkpoint(step)
            problem = damage(path)
            if problem is None:
                return path
            warnings.warn(f"{path} is passed over: {problem}.", stacklevel=2)
        return None

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after so many steps."""
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """After how many steps there are checkpoints, whole or not."""
        matches = (_CHECKPOINT.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return [int(match[1]) for match in matches if match]

    def publish(self, written: Path, step: int, *, keep: int) -> None:
        """Moves a checkpoint that was written elsewhere in this folder to its place, and removes older ones.

        Args:
            written: its folder, on the same disk.
            step: after how many steps it was made.
            keep: how many checkpoints stay, this one included.
        """
        write_manifest(written)
        place = self.checkpoint(step)
        self._remove(place)
        os.rename(written, place)
        _flush(self.folder)
        for old in sorted(self.steps())[:-keep]:
            self._remove(self.checkpoint(old))

    def _remove(self, folder: Path) -> None:
        """First by name, so that no half of it is left under that name."""
        if folder.exists():
            away = self.folder / f"{REMOVING}-{folder.name}"
            shutil.rmtree(away, ignore_errors=True)
            os.rename(folder, away)
            shutil.rmtree(away, ignore_errors=True)

    def keep_metrics(self, step: int) -> None:
        """Drops the lines of `metrics.jsonl` of later steps, which will be written again, and one torn by a kill."""
        path = self.folder / METRICS
        if not path.exists():
            return
        steps = [(_step(line), line) for line in path.read_text(encoding="utf-8").split("\n")]
        kept = "".join(line + "\n" for at, line in steps if at is not None and at <= step)
        beside = path.with_name(f"{METRICS}.new")
        beside.write_text(kept, encoding="utf-8")
        os.replace(beside, path)

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """Writes one line of `metrics.jsonl`."""
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        path = self.folder / METRICS
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def report(self) -> dict[str, Any] | None:
        """What the run wrote down at its end, or None while it has not ended."""
        path = self.folder / REPORT
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _placed(value: Any) -> Any:
    """A setting with each path in it made absolute, so that a file is the same by whatever name."""
    if isinstance(value, str):
        return os.path.abspath(value) if os.path.exists(value) else value
    if isinstance(value, list):
        return [_placed(item) for item in value]
    if isinstance(value, dict):
        return {key: _placed(item) for key, item in value.items()}
    return value


def write_manifest(folder: Path) -> None:
    """Flushes a checkpoint's files to the disk and writes down their sizes and checksums."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "crc32": _checksum(path)}
            _flush(path)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    _flush(manifest)
    _flush(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"it lacks {name}"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes and had {expected['bytes']}"
            if _checksum(path) != expected["crc32"]:
                return f"the contents of {name} have changed"
    except FileNotFoundError:
        return f"it lacks {MANIFEST}, which is written last"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} or what it names cannot be read ({error})"
    return None


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_leftover(entry: Path) -> bool:
    """Whether it is a working folder that a killed run left behind."""
    return entry.is_dir() and (
        entry.name.startswith((SAVING, REMOVING)) or re.fullmatch(r"\..*-[0-9a-f]{8}", entry.name) is not None
    )


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
