"""The upload of a trained checkpoint, with its card, to the Hugging Face Hub."""

from __future__ import annotations

import json
import os
import warnings
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # its __all__ is computed

from parscale.checkpoints.training.model_card import CARD, is_hub_name
from parscale.checkpoints.training.run_folder import CONTROLS, Run
from parscale.checkpoints.training.run_result import card_of
from parscale.compat.hub import NO_ANSWER
from parscale.format.folders import BACKBONE, CONFIG, FULL, STREAMS_CONFIG, STREAMS_ONLY, Checkpoint, set_names

# What of a trained folder is not the model: the Trainer's checkpoints and logs, and hidden files.
NOT_UPLOADED = ("metrics.jsonl", "run.json", ".*", "*/.*")
FOLDERS_NOT_UPLOADED = ("checkpoint-[0-9]*", "controls", "runs")  # unless they are sets of streams


def push(folder: str | os.PathLike[str], repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Uploads a trained checkpoint with its card to the Hub, without the Trainer's checkpoints and logs.

    A card that `train` wrote, and nobody has changed, is uploaded with the repository's name in place of the folder's.

    Args:
        folder: a checkpoint with streams, of any kind, with its card, `README.md`.
        repo_id: the name of the repository, such as `"me/my-model"`; it is created if it does not exist.
        private: whether a repository created here is private.
        token: for the Hub; by default that of `hf auth login`.

    Returns:
        The URL of the upload.

    Raises:
        ValueError: the folder has no checkpoint with streams or no card, or `repo_id` is not a valid name.
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
        if not is_hub_name(backbone):
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
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
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
    """The card that a run left, under another name; None for one that it did not write, or that was changed."""
    try:
        reports = [Run(folder).report() or {}]
        if (folder / CONTROLS).is_file():
            controls = json.loads((folder / CONTROLS).read_text(encoding="utf-8"))
            reports.append(reports[0] | {key: controls[key] for key in ("comparisons", "controls")})
        card = (folder / CARD).read_text(encoding="utf-8")
        of_run = next((report for report in reports if card_of(folder, report) == card), None)
        return None if of_run is None else card_of(folder, of_run | {"name": name})
    except (OSError, ValueError, KeyError, TypeError):  # there is no report, or not one of this version
        return None


def check_repository(repo_id: str) -> None:
    """Refuses what cannot be the name of a repository on the Hub.

    Raises:
        ValueError: the name is not valid.
    """
    validate_repo_id(repo_id)
