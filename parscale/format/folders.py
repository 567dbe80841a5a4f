"""The contents of a checkpoint, from the headers of its files: damage is found before any weight is allocated.

A checkpoint is a folder, or a repository on the Hugging Face Hub. There are three kinds (see `parscale.loading`):

- full: `config.json` with `parscale_n`, and `model.safetensors` or shards with their index
- streams only: `parscale_config.json` and `streams.safetensors`
- plain backbone: `config.json` without `parscale_n`; refused where streams are loaded
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from parscale.config import DEFAULT_SET, NUM_STREAMS, SET_NAME, SET_PATTERN, SETS, STREAMS_OFF, ParScaleConfig
from parscale.format.headers import StoredTensor, read_header
from parscale.format.moving import cut_off
from parscale.format.untrusted import brief, parse_json
from parscale.format.working import working_folder

CONFIG, WEIGHTS = "config.json", "model.safetensors"
STREAMS_CONFIG, STREAMS_FILE = "parscale_config.json", "streams.safetensors"
BACKBONE, BACKBONE_PATH = "base_model_name_or_path", "backbone_path"  # the second is relative to the folder
FULL, STREAMS_ONLY, PLAIN = "full", "streams only", "plain backbone"
FORMAT_VERSION = 1  # of a streams-only folder
TYPE_SUFFIX = "_parscale"  # a full checkpoint's model_type is that of the backbone plus this suffix
INFIX = "ParScale"  # in the name of a full checkpoint's class
CAUSAL_LM = f"{INFIX}ForCausalLM"  # the end of the class name of a causal language model
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's, beside streams or a model

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_ON_THE_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)  # a name there
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_TRAINER_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.\w+")
_OF_VARIANT = re.compile(r"model\.(.+)(?<!-of-\d{5})\.safetensors|model\.safetensors\.index\.(.+)\.json")
_ALLOWED = f"(letters, digits, '-' and '_', but not {STREAMS_OFF!r})"  # as their names
_LARGEST_JSON, _LARGEST_INDEX = 16 * 2**20, 64 * 2**20


class Checkpoint:
    """The files of a checkpoint.

    Args:
        path_or_repo: a folder, or the name of a repository on the Hub.
        **hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, `force_download`,
            `proxies`, as in `from_pretrained`.

    Raises:
        ValueError: not a path.
        FileNotFoundError: the folder does not exist, and the name cannot be one on the Hub.
        NotADirectoryError: the path is a file.
    """

    def __init__(self, path_or_repo: str | os.PathLike[str], **hub: Any) -> None:
        if not isinstance(path_or_repo, str | os.PathLike) or not os.fspath(path_or_repo):
            raise ValueError(f"A checkpoint must be a folder or a name on the Hub, got {path_or_repo!r}.")
        self.name = os.fspath(path_or_repo)
        self.hub = {key: value for key, value in hub.items() if value is not None}
        self.folder: Path | None = None
        if os.path.isdir(self.name):
            self.folder = Path(self.name, self.hub.get("subfolder", ""))
        elif os.path.exists(self.name):
            raise NotADirectoryError(f"{self.name} is a file: give the checkpoint's folder.")
        elif not _ON_THE_HUB.fullmatch(self.name):
            raise FileNotFoundError(f"There is no folder {self.name}, and a name on the Hub looks like org/model.")

    def __str__(self) -> str:
        return self.name if self.folder is None else str(self.folder)

    def kind(self) -> str:
        """`FULL`, `STREAMS_ONLY` or `PLAIN`.

        Raises:
            FileNotFoundError: it is empty or of no kind, or there is no such repository.
            ValueError: its `config.json` is damaged.
        """
        config = self.file(CONFIG)
        if config is not None and has_stream_fields(read_json(config)):
            return FULL
        if self.file(STREAMS_CONFIG) is not None:
            return STREAMS_ONLY
        if config is not None:
            return PLAIN
        if self.folder is None:
            raise FileNotFoundError(
                f"There is no folder {self.name}, and the Hugging Face Hub has no such checkpoint or cannot be reached."
            )
        if not any(self.folder.iterdir()):
            raise FileNotFoundError(f"The folder {self} is empty; a checkpoint has a {CONFIG} or a {STREAMS_CONFIG}.")
        raise FileNotFoundError(
            f"{self} holds neither a {CONFIG} nor a {STREAMS_CONFIG}: it is not a checkpoint.{self._cut_off()}"
        )

    def kind_with_streams(self) -> str:
        """`FULL` or `STREAMS_ONLY`.

        Raises:
            FileNotFoundError: as in `kind`.
            ValueError: it is a plain model, or its `config.json` is damaged.
        """
        kind = self.kind()
        if kind == PLAIN:
            model_type = self.read_json(CONFIG).get("model_type")
            raise ValueError(
                f"{self} is not a ParScale checkpoint but a plain model (model_type {model_type!r}): "
                "parscale.wrap(AutoModelForCausalLM.from_pretrained(...)) or `parscale convert` gives it streams."
                f"{self._cut_off()}"
            )
        return kind

    def file(self, name: str) -> Path | None:
        """The path of a file, which is fetched if the checkpoint is on the Hub; `None` if it does not exist.

        Raises:
            ValueError: it is not a regular file.
            OSError: the Hub has the repository but does not return the file.
        """
        if self.folder is not None:
            path = self.folder / name
            require_regular(path)
            return path if path.is_file() else None
        try:
            return Path(hf_hub_download(self.name, name, **{k: v for k, v in self.hub.items() if k != "proxies"}))
        except LocalEntryNotFoundError:  # no answer: a request for the next file would wait as long again
            self.hub["local_files_only"] = True
            return None
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError) as error:
            raise FileNotFoundError(
                f"There is no folder {self.name}, and the Hugging Face Hub does not give such a checkpoint: {error}"
            ) from error

    def read_json(self, name: str) -> dict[str, Any]:
        """The contents of one of its JSON files.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is not JSON, or not an object.
        """
        path = self.file(name)
        if path is None:
            raise FileNotFoundError(f"{self} has no {name}: the checkpoint is incomplete; copy or save it again.")
        return read_json(path)

    def weights(self, variant: str | None = None) -> dict[str, StoredTensor]:
        """Names, shapes and positions of the tensors of a full checkpoint.

        Args:
            variant: of the file names, as in `from_pretrained`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: all weights are pickles, a file is damaged, or the index does not match its shards.
        """
        infix = f".{variant}" if variant else ""
        whole, index = f"model{infix}.safetensors", f"model.safetensors.index{infix}.json"
        path = self.file(whole)
        if path is not None:
            return read_header(path)
        path = self.file(index)
        if path is not None:
            return self._sharded_weights(path)
        pickles = self._pickles()
        if pickles:
            raise ValueError(
                f"{self} has {pickles} in place of {WEIGHTS}: parscale reads safetensors only, since "
                "unpickling a file can run any code. Save the model again with save_pretrained."
            )
        raise FileNotFoundError(
            f"{self} has no {whole} and no {index}: the weights are missing.{self._variant()}{self._cut_off()}"
        )

    def streams(self) -> dict[str, StoredTensor]:
        """Names, shapes and positions of the tensors of a streams-only checkpoint.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: it is damaged.
        """
        path = self.file(STREAMS_FILE)
        if path is None:
            pickles = self._pickles()
            given = f" ({pickles} is not read: pickles can run any code)" if pickles else ""
            raise FileNotFoundError(f"{self} has no {STREAMS_FILE}: the streams are missing{given}.{self._cut_off()}")
        return read_header(path)

    def inside(self, name: str) -> Checkpoint:
        """The checkpoint in a sub-folder.

        Raises:
            FileNotFoundError: the sub-folder does not exist.
        """
        if self.folder is not None:
            if not (self.folder / name).is_dir():
                raise FileNotFoundError(f"{self} has no folder {name}, which it names: copy or save it again.")
            return Checkpoint(self.folder / name)
        above = self.hub.get("subfolder")
        return Checkpoint(self.name, **self.hub | {"subfolder": f"{above}/{name}" if above else name})

    def _pickles(self) -> str:
        """The names of up to three pickles in a folder, for an error; empty if there are none."""
        paths = [] if self.folder is None else sorted(self.folder.iterdir())
        found = [path.name for path in paths if path.suffix in _PICKLES and not _TRAINER_STATE.fullmatch(path.name)]
        return ", ".join(found[:3])

    def _variant(self) -> str:
        """How to read a folder whose weights are those of a variant, for the end of an error; otherwise empty."""
        names = [] if self.folder is None else sorted(path.name for path in self.folder.glob("model.*"))
        found = next(filter(None, map(_OF_VARIANT.fullmatch, names)), None)
        if found is None:
            return ""
        call = f"AutoModelForCausalLM.from_pretrained({str(self)!r}, variant={found[1] or found[2]!r})"
        return f" There is {found[0]}, which {call} reads."

    def _cut_off(self) -> str:
        """What to do where a save into the folder was cut off, for the end of an error; otherwise empty."""
        moving = None if self.folder is None else cut_off(working_folder(self.folder))
        if moving is None:
            return ""
        return f" A save was cut off: move the files in {moving} to {self}, if it has none of these names."

    def _sharded_weights(self, index: Path) -> dict[str, StoredTensor]:
        contents = read_json(index)
        places = contents.get("weight_map")
        if not isinstance(contents.get("metadata"), dict) or not isinstance(places, dict):
            raise ValueError(f"{index} should hold an object 'metadata' and an object 'weight_map'.")
        for shard in places.values():
            if not _is_plain_name(shard):
                raise ValueError(
                    f"{index} names the shard {brief(repr(shard))}: a shard lies in the folder of its index."
                )
        shards: dict[str, set[str]] = {}
        for name, shard in places.items():
            shards.setdefault(shard, set()).add(name)
        tensors: dict[str, StoredTensor] = {}
        for shard, indexed in sorted(shards.items()):
            path = self.file(shard)
            if path is None:
                raise FileNotFoundError(
                    f"{self} has no {shard}, which {index.name} names: copy it there again.{self._cut_off()}"
                )
            header = read_header(path)
            if indexed != header.keys():
                name = min(indexed ^ header.keys())
                where = "the index alone" if name in indexed else "the shard alone"
                raise ValueError(f"{index.name} and {shard} of {self} do not agree: {brief(name)} is in {where}.")
            tensors |= header
        return tensors


def require_regular(path: Path) -> None:
    """Raises an error, before opening it, for a file that would block or never end; missing files and folders pass.

    Raises:
        ValueError: the path is a named pipe, a socket or a device.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # missing, or not a valid file name
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        what = kinds.get(stat.S_IFMT(mode), "a device")
        raise ValueError(f"{path} is {what}, which is not opened: a checkpoint holds regular files. Copy it again.")


def has_stream_fields(fields: Mapping[str, Any]) -> bool:
    """Whether the fields of a `config.json` are those of a model with streams."""
    return NUM_STREAMS in fields or str(fields.get("model_type", "")).endswith(TYPE_SUFFIX)


def stream_config(checkpoint: Checkpoint, fields: Mapping[str, Any]) -> ParScaleConfig:
    """The configuration of a set of streams, from the fields of a JSON file.

    Raises:
        ValueError: a field is missing, of the wrong type or out of range.
    """
    try:
        return ParScaleConfig.from_fields(fields)
    except ValueError as error:
        raise ValueError(f"The configuration of {checkpoint} is damaged: {error}") from error


def hub_name(name: object) -> str | None:
    """A name that can be one on the Hugging Face Hub, and is no path here; `None` in place of anything else."""
    if not isinstance(name, str) or os.path.exists(name):
        return None
    return name if _ON_THE_HUB.fullmatch(name) else None


def set_name(checkpoint: Checkpoint, fields: Mapping[str, Any]) -> str:
    """The name of the set in a streams-only checkpoint, from its `parscale_config.json`.

    Raises:
        ValueError: the name is invalid.
    """
    name = fields.get("name", DEFAULT_SET)
    if not _is_set_name(name):
        raise ValueError(
            f"{STREAMS_CONFIG} of {checkpoint} should name a set of streams {_ALLOWED}, but has {brief(repr(name))}."
        )
    return name


def set_names(checkpoint: Checkpoint, fields: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    """The name of the active set (`None` if no set is active) and of the other sets of a full checkpoint.

    Raises:
        ValueError: a name is invalid, or appears twice.
    """
    name, further = fields.get(SET_NAME, DEFAULT_SET), fields.get(SETS, [])
    names = further if name is None else [name, *further] if isinstance(further, list) else None
    if not isinstance(names, list) or not all(map(_is_set_name, names)):
        raise ValueError(
            f"{CONFIG} of {checkpoint} should name sets of streams {_ALLOWED}, but has {brief(repr(name))} and "
            f"{brief(repr(further))}."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{CONFIG} of {checkpoint} names a set of streams twice: {brief(', '.join(names))}.")
    return name, further


def backbone_location(checkpoint: Checkpoint, fields: Mapping[str, Any]) -> str | None:
    """The backbone of a streams-only checkpoint: a folder, or a name on the Hub; `None` if the checkpoint names none.

    A relative path is resolved from the checkpoint's folder or, if nothing is there, from the working directory. The
    backbone's path when the streams were saved is tried first, then its path relative to the streams: both folders may
    have moved together.

    Args:
        checkpoint: a streams-only checkpoint.
        fields: of its `parscale_config.json`.
    """
    name, path = fields.get(BACKBONE), fields.get(BACKBONE_PATH)
    if not isinstance(name, str) or not name:
        return None
    candidates = [name, path] if isinstance(path, str) and os.path.isabs(name) else [name]
    folder = None if checkpoint.folder is None else os.path.realpath(checkpoint.folder)
    places = [os.path.normpath(os.path.join(folder, each)) for each in candidates] if folder is not None else []
    return next(filter(os.path.isdir, places), name)


def _is_set_name(name: object) -> bool:
    return isinstance(name, str) and name != STREAMS_OFF and re.fullmatch(SET_PATTERN, name) is not None


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file.

    Raises:
        ValueError: it is not JSON, or not an object.
    """
    largest = _LARGEST_INDEX if path.name.startswith(WEIGHTS) else _LARGEST_JSON
    if path.stat().st_size > largest:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, but at most {largest} are read.")
    try:
        contents = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): it is damaged, copy or save it again.") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} should hold a JSON object, but holds {type(contents).__name__}.")
    return contents


def _is_plain_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\0]", name)
