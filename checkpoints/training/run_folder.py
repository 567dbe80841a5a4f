"""The folder of a training run: what it was started with, its checkpoints, and the metrics that it has written.

- `run.json`: what the run was started with; going on with other settings is refused
- `metrics.jsonl`: one line for each step, and for each text that was measured
- `checkpoint-N`: what going on needs after N steps, with `manifest.json`: its files, their sizes and checksums
- `training.json`: the report, written when the run has ended and the model stands in the folder

A checkpoint is written in a working folder (`parscale.format.working`), flushed to the disk, and moved to its
place when it is whole. The process that runs holds a lock on `run.json`, which ends with it.

Nothing is removed for its name alone: a working folder is known by its marker, a checkpoint by its manifest.
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

from parscale.format.staging import (
    flush,
    holds_something,
    require_new_folder,
    require_writable_folder,
    staged,
    staged_file,
)
from parscale.format.working import lock, remove_leftovers, working, working_folder

RUN, METRICS, REPORT, MANIFEST = "run.json", "metrics.jsonl", "training.json", "manifest.json"
CONTENTS = {"checkpoint_digest": "checkpoint", "data_digest": "data", "eval_digests": "eval_data"}
"""What a run reads, by where its settings have the digest; a digest that is unknown is not compared."""
_PARTS = {  # of a checkpoint, and the names that they may have; DeepSpeed's engine writes all of them
    "the weights": r".*\.safetensors|pytorch_model_fsdp.*|global_step.*",
    "the optimizer's state": r"optimizer.*|global_step.*",
    "the scheduler's state": r"scheduler\.pt|global_step.*",
    "the random numbers' state": r"rng_state(_\d+)?\.pth",
    "the Trainer's state": r"trainer_state\.json",
}
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_CHUNK = 1 << 22


class Run:
    """A run's folder. Once a process has begun or gone on with the run, it holds a lock on it until `release`.

    Args:
        folder: where; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: int | None = None

    def check(self, *, resume: bool) -> None:
        """Refuses a folder that is in use, or cannot be written, before any work.

        Raises:
            ValueError: it is a file, or holds something and `resume` is not set.
            OSError: it cannot be written, or another process goes on with the run.
        """
        if not resume and holds_something(self.folder):
            raise ValueError(
                f"The output folder {self.folder} is not empty; give a new one, or --resume to go on with its run."
            )
        if not holds_something(self.folder):
            require_new_folder(self.folder)
        if self.report() is not None:
            return
        if (self.folder / RUN).is_file():
            self._take_lock()
        require_writable_folder(self.folder)

    def begin(self, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Makes the folder and writes down what the run is started with, or checks that it goes on with the same.

        Raises:
            ValueError: the folder is in use, or the run in it was started with other settings.
            OSError: it cannot be written, or another process has begun or goes on with the run.
        """
        self.check(resume=resume)
        settings = json.loads(json.dumps(settings))
        path = self.folder / RUN
        if path.is_file():
            self._require_same(settings)
        elif holds_something(self.folder):
            raise ValueError(f"{self.folder} holds no run to go on with (it has no {RUN}); give a new folder.")
        else:
            with staged(self.folder, last=RUN, new=True) as work:
                (work / RUN).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            self._take_lock()
        remove_leftovers(self.folder)

    def _require_same(self, settings: Mapping[str, Any]) -> None:
        path = self.folder / RUN
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); start in a new folder.") from error
        if not isinstance(before, dict):
            raise ValueError(f"{path} should hold a JSON object and is damaged; start in a new folder.")
        changed = [
            _change(key, before.get(key), settings.get(key))
            for key in {**settings, **before}
            if _placed(settings.get(key)) != _placed(before.get(key))
            and not (key in CONTENTS and None in (settings.get(key), before.get(key)))
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
        """Lets another process go on with the run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

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

    def kept(self) -> str:
        """The end of a message about a run that has stopped: what is left of it."""
        newest = self.newest_checkpoint()
        return f" {newest} is whole." if newest is not None else ""

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after so many steps."""
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """After how many steps there are checkpoints, whole or not."""
        matches = (_CHECKPOINT.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return [int(match[1]) for match in matches if match]

    @property
    def saving(self) -> Path:
        """Where checkpoints are written before they are published; inside a block of `working`."""
        return working_folder(self.folder, "checkpoint")

    def working(self) -> AbstractContextManager[Path]:
        """Makes `saving` for a block, and removes it after it."""
        return working(self.folder, "checkpoint")

    def publish(self, written: Path, step: int, *, keep: int, processes: int = 1) -> None:
        """Moves a checkpoint from `saving` to its place, and removes older ones.

        What has a checkpoint's name but no manifest stays; if it is in the way, it gets another name.

        Args:
            written: its folder.
            step: after how many steps it was made.
            keep: how many checkpoints stay, this one included.
            processes: how many took part, each with random numbers of its own.

        Raises:
            RuntimeError: it lacks something without which no run can go on.
        """
        write_manifest(written, processes)
        place = self.checkpoint(step)
        if _files_in_manifest(place) is not None:
            os.rename(place, self.saving / f"replaced-{place.name}")
        elif os.path.lexists(place):
            aside = place.with_name(f"{place.name}-{uuid.uuid4().hex[:8]}")
            os.rename(place, aside)
            warnings.warn(f"{place} has no {MANIFEST} of a run; it is kept as {aside}.", stacklevel=2)
        if (self.folder / METRICS).exists():
            flush(self.folder / METRICS)
        os.rename(written, place)
        flush(self.folder)
        ours = [other for other in sorted(self.steps()) if _files_in_manifest(self.checkpoint(other)) is not None]
        for old in map(self.checkpoint, ours[:-keep]):
            os.rename(old, self.saving / f"old-{old.name}")  # the whole of it at once; removed with the folder

    def keep_metrics(self, step: int) -> None:
        """Drops the lines of `metrics.jsonl` of later steps, which will be written again, and one torn by a kill."""
        path = self.folder / METRICS
        if not path.exists():
            return
        steps = [(_step(line), line) for line in path.read_text(encoding="utf-8").split("\n")]
        kept = "".join(line + "\n" for at, line in steps if at is not None and at <= step)
        with staged_file(path) as beside:
            beside.write_text(kept, encoding="utf-8")

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """Writes one line of `metrics.jsonl`.

        Raises:
            ValueError: a number in it is not finite, which JSON cannot hold.
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


def write_manifest(folder: Path, processes: int = 1) -> None:
    """Flushes a checkpoint's files to the disk and writes down their sizes and checksums.

    Args:
        folder: of the checkpoint.
        processes: how many took part.

    Raises:
        RuntimeError: something is missing without which no run can go on.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "crc32": _checksum(path)}
            flush(path)
        elif path.is_dir():
            flush(path)
    if missing := _missing(files, processes):
        raise RuntimeError(f"{folder} is no whole checkpoint: it lacks {', '.join(missing)}.")
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files, "processes": processes}, indent=1) + "\n", encoding="utf-8")
    flush(manifest)
    flush(folder)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole."""
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
    """What a checkpoint of these files lacks to go on from."""
    names = list(names)
    missing = [part for part, pattern in _PARTS.items() if not any(re.fullmatch(pattern, name) for name in names)]
    if processes > 1:
        missing += [name for name in (f"rng_state_{rank}.pth" for rank in range(processes)) if name not in names]
    return missing


def _files_in_manifest(folder: Path) -> dict[str, Any] | None:
    """The files that a run has written into a checkpoint, or None for a folder that no run has made."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        written = all(entry.keys() >= {"bytes", "crc32"} for entry in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return files if written else None


def _change(key: str, before: Any, now: Any) -> str:
    """A setting that has changed, in words."""
    change = f"{key} was {before!r} and is {now!r}"
    if key not in CONTENTS:
        return change
    parts = [name for name in now if now[name] != before.get(name)] if isinstance(now, dict) else []
    return f"{change} (the contents of {', '.join([CONTENTS[key], *parts])} have changed; put back what they were)"


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
