"""The folder of a training run: its settings, its checkpoints, and its metrics.

- `run.json`: the settings that the run was started with, paths among them absolute; it cannot be resumed with others
- `metrics.jsonl`: one line for each step, and for each measured text
- `checkpoint-N`: what is needed to resume after N steps, with `manifest.json`: its files, their sizes and checksums
- `training.json`: the report, written when the run has ended and the model is in the folder

A checkpoint is written in a working folder (`parscale.format.working`), flushed to disk, and moved to its place when it
is complete. The running process holds a lock on `run.json`, which ends with the process.

Nothing is removed because of its name alone: a working folder has a marker, a checkpoint has a manifest.
"""

from __future__ import annotations

import json
import os
import re
import uuid
import warnings
import zlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from parscale.format.moving import flush
from parscale.format.staging import (
    holds_something,
    require_new_folder,
    require_writable_folder,
    staged,
    staged_file,
)
from parscale.format.working import lock, remove_leftovers, working, working_folder

RUN, METRICS, REPORT, MANIFEST = "run.json", "metrics.jsonl", "training.json", "manifest.json"
CONTROLS = "controls.json"  # the report of controls, where they were trained beside the run
CONTENTS = {"checkpoint_digest": "checkpoint", "data_digest": "data", "eval_digests": "eval_data"}
"""What a run reads, by the setting that holds its digest; unknown digests are not compared."""
WITH_PATHS = (*CONTENTS.values(), "new_model")
READ_BY = {"data_digest": "streaming", "eval_digests": "eval_tokens"}
"""The settings that digests of the same contents depend on."""
_PARTS = {  # parts of a checkpoint and patterns of their file names; DeepSpeed's engine writes all of them
    "the weights": r".*\.safetensors|pytorch_model_fsdp.*|global_step.*",
    "the optimizer's state": r"optimizer.*|global_step.*",
    "the scheduler's state": r"scheduler\.pt|global_step.*",
    "the random numbers' state": r"rng_state(_\d+)?\.pth",
    "the Trainer's state": r"trainer_state\.json",
}
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_CHUNK = 1 << 22


class Run:
    """The folder of a run. A process that has started or resumed the run holds a lock on it until `release`.

    Args:
        folder: its path; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: int | None = None

    def check(self, *, resume: bool) -> None:
        """Checks, before any work, that the folder is not in use and can be written.

        Raises:
            ValueError: it is a file, or it is not empty and `resume` is not set.
            OSError: it cannot be written, or another process is running the run.
        """
        if not resume and holds_something(self.folder):
            raise ValueError(
                f"The output folder {self.folder} is not empty; give a new one, or --resume to continue its run."
            )
        if not holds_something(self.folder):
            require_new_folder(self.folder)
        if self.report() is not None:
            return
        if (self.folder / RUN).is_file():
            self._take_lock()
        require_writable_folder(self.folder)

    def begin(self, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Creates the folder and stores the settings of the run, or checks that a resumed run has the same settings.

        Raises:
            ValueError: the folder is in use, or the run in it was started with other settings.
            OSError: it cannot be written, or another process is running the run.
        """
        self.check(resume=resume)
        settings = json.loads(json.dumps(settings))
        settings = {**settings, **{key: _with_absolute_paths(settings[key]) for key in WITH_PATHS if key in settings}}
        path = self.folder / RUN
        if path.is_file():
            self.require_same(settings)
        elif holds_something(self.folder):
            raise ValueError(f"{self.folder} holds no run to resume (it has no {RUN}); give a new folder.")
        else:
            with staged(self.folder, last=RUN, new=True) as work:
                (work / RUN).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            self._take_lock()
        remove_leftovers(self.folder)

    def require_same(self, settings: Mapping[str, Any], *, partly: bool = False) -> None:
        """Refuses other settings than those that the run was started with.

        Args:
            settings: that it would be started with.
            partly: whether these are some of them, as far as they are known; others are then not compared.

        Raises:
            ValueError: the run was started with others, or its settings are damaged.
        """
        before = read_object(self.folder / RUN, "start in a new folder")
        compared = [key for key in settings if key in before] if partly else [*{**settings, **before}]
        differs = [
            key
            for key in compared
            if not _is_same(settings.get(key), before.get(key))
            and not _has_same_contents(key, settings, before)
            and not (key in CONTENTS and None in (settings.get(key), before.get(key)))
        ]
        changed = [
            _change(key, before.get(key), settings.get(key)) for key in differs if READ_BY.get(key) not in differs
        ]
        if changed:
            raise ValueError(f"The run in {self.folder} was started with other settings: {'; '.join(changed)}.")

    def _take_lock(self) -> None:
        if self._lock is None:
            descriptor = os.open(self.folder / RUN, os.O_RDWR)
            try:
                lock(descriptor, self.folder)
            except BaseException:
                os.close(descriptor)
                raise
            self._lock = descriptor

    def release(self) -> None:
        """Lets another process resume the run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def newest_checkpoint(self) -> Path | None:
        """The latest complete checkpoint, if there is one; warns about each later one that is incomplete."""
        if not self.folder.is_dir():
            return None
        for step in sorted(self.steps(), reverse=True):
            path = self.checkpoint(step)
            problem = damage(path)
            if problem is None:
                return path
            warnings.warn(f"{path} is skipped: {problem}.", stacklevel=2)
        return None

    def resume_hint(self) -> str:
        """The end of a message about a stopped run: the checkpoint to resume from."""
        newest = self.newest_checkpoint()
        return f" {newest} is complete." if newest is not None else ""

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after this number of steps."""
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """The steps of all checkpoints, complete or not."""
        matches = (_CHECKPOINT.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return [int(match[1]) for match in matches if match]

    @property
    def saving(self) -> Path:
        """The folder in which checkpoints are written before `publish`; exists inside a block of `working`."""
        return working_folder(self.folder, "checkpoint")

    def working(self) -> AbstractContextManager[Path]:
        """Creates `saving` for a block, and removes it afterwards."""
        return working(self.folder, "checkpoint")

    def publish(self, written: Path, step: int, *, keep: int, processes: int = 1) -> None:
        """Moves a checkpoint from `saving` to its place, and removes older ones.

        A folder with a checkpoint's name but no manifest stays; if it is in the way, it is renamed.

        Args:
            written: folder of the written checkpoint.
            step: its number of steps.
            keep: number of checkpoints to keep, including this one.
            processes: number of processes of the run; each stores the state of its random numbers.

        Raises:
            RuntimeError: something is missing that resuming needs.
        """
        write_manifest(written, processes)
        place = self.checkpoint(step)
        if _files_in_manifest(place) is not None:
            os.rename(place, self.saving / f"replaced-{place.name}")
        elif os.path.lexists(place):
            aside = place.with_name(f"{place.name}-{uuid.uuid4().hex[:8]}")
            os.rename(place, aside)
            warnings.warn(f"{place} has no {MANIFEST} of a run; it was renamed to {aside}.", stacklevel=2)
        if (self.folder / METRICS).exists():
            flush(self.folder / METRICS)
        os.rename(written, place)
        flush(self.folder)
        ours = [other for other in sorted(self.steps()) if _files_in_manifest(self.checkpoint(other)) is not None]
        for old in map(self.checkpoint, ours[:-keep]):
            os.rename(old, self.saving / f"old-{old.name}")  # as a whole; removed with the folder

    def keep_metrics(self, step: int) -> None:
        """Drops the lines of later steps from `metrics.jsonl`, which will be written again, and an incomplete line."""
        path = self.folder / METRICS
        if not path.exists():
            return
        steps = [(_step(line), line) for line in path.read_text(encoding="utf-8").split("\n")]
        kept = "".join(line + "\n" for at, line in steps if at is not None and at <= step)
        with staged_file(path) as beside:
            beside.write_text(kept, encoding="utf-8")

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """Appends one line to `metrics.jsonl`.

        Raises:
            ValueError: a number in it is not finite, which JSON does not support.
        """
        text = json.dumps(line, allow_nan=False)
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        path = self.folder / METRICS
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def report(self) -> dict[str, Any] | None:
        """The report at the end of the run; None before the end.

        Raises:
            ValueError: it is damaged.
        """
        path = self.folder / REPORT
        return read_object(path, "remove it, and --resume writes it again") if path.exists() else None


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object of a run's folder.

    Args:
        path: its file.
        remedy: what to do where that is damaged, for the error.

    Raises:
        ValueError: it is damaged.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}.") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} should hold a JSON object and is damaged; {remedy}.")
    return contents


def _with_absolute_paths(value: object) -> Any:
    """A setting with all paths in it made absolute, so that one file is always the same setting."""
    if isinstance(value, str):
        return os.path.abspath(value) if os.path.exists(value) else value
    if isinstance(value, list):
        return [_with_absolute_paths(item) for item in value]
    if isinstance(value, dict):
        return {key: _with_absolute_paths(item) for key, item in value.items()}
    return value


def _is_same(now: object, before: object) -> bool:
    """Whether two values of a setting agree; a file that is gone may be named relative to this folder."""
    if isinstance(now, list) and isinstance(before, list):
        return len(now) == len(before) and all(map(_is_same, now, before))
    if isinstance(now, dict) and isinstance(before, dict):
        return now.keys() == before.keys() and all(_is_same(now[key], before[key]) for key in now)
    gone = isinstance(now, str) and os.path.abspath(now) == before
    return gone or _with_absolute_paths(now) == _with_absolute_paths(before)


def _has_same_contents(key: str, settings: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a setting names, perhaps in other words, what has the same digest; that of streams is of a part only."""
    digest = next((digest for digest, named in CONTENTS.items() if named == key), None)
    if digest is None or (key == "data" and settings.get("streaming")):
        return False
    return settings.get(digest) is not None and settings[digest] == before.get(digest)


def write_manifest(folder: Path, processes: int = 1) -> None:
    """Flushes a checkpoint's files to disk and stores their sizes and checksums.

    Args:
        folder: the checkpoint's folder.
        processes: number of processes of the run.

    Raises:
        RuntimeError: something is missing that resuming needs.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "crc32": _checksum(path)}
            flush(path)
        elif path.is_dir():
            flush(path)
    if missing := _missing(files, processes):
        raise RuntimeError(f"{folder} is an incomplete checkpoint: it lacks {', '.join(missing)}.")
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files, "processes": processes}, indent=1) + "\n", encoding="utf-8")
    flush(manifest)
    flush(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is complete."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"it lacks {name}"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes and had {expected['bytes']}"
            if _checksum(path) != expected["crc32"]:
                return f"the contents of {name} have changed"
        if missing := _missing(files, manifest.get("processes", 1)):
            return f"it lacks {', '.join(missing)}"
    except FileNotFoundError:
        return f"it lacks {MANIFEST}, which is written last"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} or what it names cannot be read ({error})"
    return None


def _missing(names: Iterable[str], processes: int) -> list[str]:
    """The parts that a checkpoint with these files lacks for resuming."""
    names = list(names)
    missing = [part for part, pattern in _PARTS.items() if not any(re.fullmatch(pattern, name) for name in names)]
    if processes > 1:
        missing += [name for name in (f"rng_state_{rank}.pth" for rank in range(processes)) if name not in names]
    return missing


def _files_in_manifest(folder: Path) -> dict[str, Any] | None:
    """The files of a checkpoint that a run has written; None for a folder that no run has made."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        written = all(entry.keys() >= {"bytes", "crc32"} for entry in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return files if written else None


def _change(key: str, before: object, now: object) -> str:
    """A changed setting, in words."""
    change = f"{key} was {before!r} and is {now!r}"
    if key not in CONTENTS:
        return change
    parts = []
    if isinstance(before, dict) and isinstance(now, dict):
        parts = [name for name in now if now[name] != before.get(name)]
    return f"{change} (the contents of {', '.join([CONTENTS[key], *parts])} have changed; restore the old contents)"


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
