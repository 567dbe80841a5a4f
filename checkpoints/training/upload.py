"""The upload of a trained checkpoint, with its card, to the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import re
import warnings
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # its __all__ is computed

from parscale.checkpoints.training.model_card import CARD
from parscale.checkpoints.training.run_folder import CONTROLS, Run
from parscale.checkpoints.training.run_result import card_of
from parscale.compat.hub import NO_ANSWER
from parscale.format.folders import (
    BACKBONE,
    CONFIG,
    FULL,
    STREAMS_CONFIG,
    STREAMS_ONLY,
    Checkpoint,
    hub_name,
    set_names,
)
from parscale.format.repository import make_repository

# What of a trained folder is not the model: the Trainer's checkpoints and logs, and hidden files.
NOT_UPLOADED = ("metrics.jsonl", "run.json", ".*", "*/.*")
FOLDERS_NOT_UPLOADED = ("checkpoint-[0-9]*", "controls", "runs")  # unless they are sets of streams
_HEADER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)  # of a card, in YAML


def push(folder: str | os.PathLike[str], repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Uploads a trained checkpoint with its card to the Hub, without the Trainer's checkpoints and logs.

    A card that `train` wrote is uploaded with the repository's name in place of the folder's, and with the YAML header
    that it has, which may be changed. One whose text was changed is uploaded as it is, with a warning where it still
    loads the folder.

    Args:
        folder: a checkpoint with streams, of any kind, with its card, `README.md`.
        repo_id: the name of the repository, such as `"me/my-model"`; it is created if it does not exist.
        private: whether a repository created here is private; by default what its owner's settings on the Hub say,
            which for most is public. With True, one that exists has to be private.
        token: for the Hub; by default that of `hf auth login`.

    Returns:
        The URL of the upload.

    Raises:
        ValueError: the folder has no checkpoint with streams or no card, `repo_id` is not a valid name, or the
            repository should be private, exists, and is public.
        OSError: the folder does not exist, or the Hub refuses or cannot be reached.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {path}; give the folder of a trained checkpoint.")
    checkpoint = Checkpoint(path)
    kind = checkpoint.kind_with_streams()
    if not (path / CARD).is_file():
        raise ValueError(f"{path} holds no {CARD}; write its model card first.")
    if kind == STREAMS_ONLY:
        backbone = checkpoint.read_json(STREAMS_CONFIG).get(BACKBONE)
        if hub_name(backbone) is None:
            warnings.warn(
                f"{path} holds streams only, and its backbone {backbone!r} is not on the Hub: whoever loads it has to "
                "give backbone=.",
                stacklevel=2,
            )
    sets = set_names(checkpoint, checkpoint.read_json(CONFIG))[1] if kind == FULL else []
    folders = [entry.name for entry in path.iterdir() if entry.is_dir() and entry.name not in sets]
    runs = [name for name in folders if any(fnmatchcase(name, pattern) for pattern in FOLDERS_NOT_UPLOADED)]
    check_repository(repo_id)
    api = HfApi(token=token)
    try:
        name = make_repository(api, repo_id, private)
        card = _renamed_card(path, name)
        ignored = [*NOT_UPLOADED, *(f"{name}/*" for name in runs), *([] if card is None else [CARD])]
        message = "Upload a checkpoint with parallel streams"
        upload = api.upload_folder(repo_id=name, folder_path=path, ignore_patterns=ignored, commit_message=message)
        if card is not None:
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD, repo_id=name, commit_message=message)
        return upload.commit_url
    except NO_ANSWER as error:
        if isinstance(error, OSError):
            raise
        raise OSError(f"{path} was not uploaded, since the Hugging Face Hub cannot be reached: {error}") from error


def _renamed_card(folder: Path, name: str) -> str | None:
    """The card that a run left, under another name; None for one that it did not write, or whose text was changed."""
    try:
        reports = [Run(folder).report() or {}]
        if (folder / CONTROLS).is_file():
            controls = json.loads((folder / CONTROLS).read_text(encoding="utf-8"))
            reports.append(reports[0] | {key: controls[key] for key in ("comparisons", "controls")})
        card = (folder / CARD).read_text(encoding="utf-8")
        for report in reports:
            if _text(card_of(folder, report) or "") == _text(card):
                return card.removesuffix(_text(card)) + _text(card_of(folder, report | {"name": name}) or "")
        old = reports[0].get("name")
        call = f"load({json.dumps(old, ensure_ascii=False)}"
        if old != name and call in card:
            warnings.warn(
                f"The text of {folder / CARD} was changed, so it is uploaded as it is: it still says {call}), and not "
                f"the repository's name, {name}.",
                stacklevel=3,
            )
        return None
    except (OSError, ValueError, KeyError, TypeError):  # there is no report, or not one of this version
        return None


def _text(card: str) -> str:
    """A card without its YAML header."""
    return _HEADER.sub("", card)


def check_repository(repo_id: str) -> None:
    """Refuses what cannot be the name of a repository on the Hub.

    Raises:
        ValueError: the name is not valid.
    """
    validate_repo_id(repo_id)
