"""lm-eval's tasks on a model with or without streams: lm-eval asks and scores, and the result records the settings.

The model goes to lm-eval as it is, in lm-eval's own `HFLM`, so that a figure means what it means for any other model;
where streams share keys and values, contexts run with one row (`parscale.checkpoints.evaluation.harness_model`).
`RECIPES` is a folder of task lists in lm-eval's format; its file names are their names.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import math
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parscale import __version__
from parscale.checkpoints.evaluation.harness_model import harness_model
from parscale.checkpoints.evaluation.text_loss import (
    adapting,
    checked_length,
    evaluating,
    shown_threshold,
    text_positions,
)
from parscale.checkpoints.texts.token_ids import only_known_ids
from parscale.config import STREAMS_OFF
from parscale.streams.state import active_streams

RECIPES = Path(__file__).with_name("recipes")
"""The folder of this package's task files for lm-eval, for its own command's `--include_path`."""
_YAML = (".yaml", ".yml")


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int = 8,
    sequence_length: int | None = None,
    include_path: str | Path | None = None,
    confirm_run_unsafe_code: bool = False,
    adaptive: float | None = None,
) -> dict[str, Any]:
    """Runs lm-eval's tasks on a model, with its active streams or as the plain backbone.

    Random choices of lm-eval (few-shot examples, bootstrapped errors) use its default seeds. Its progress, and what
    tasks print, goes to standard error.

    Args:
        model: a causal language model; it runs on its own device and in its own dtype.
        tokenizer: its tokenizer; lm-eval gives it a padding token if it has none.
        tasks: names of tasks, groups and tags, patterns such as `"mmlu_*"`, or files of single tasks.
        num_fewshot: examples before each question, in place of the tasks' own numbers, except for tasks that set 0.
        limit: maximum number of questions of each task, or, below 1, a share of them; for trial runs only.
        batch_size: questions in a batch.
        sequence_length: tokens that the model sees at once; by default the number of its positions.
        include_path: a folder with your own task files. These, and task files given by path, can run code on this
            machine when lm-eval reads them (`!function`, templates): a warning names them first.
        confirm_run_unsafe_code: whether tasks may run the code that the model writes. It does not affect the code that
            task files run.
        adaptive: as in `parscale.checkpoints.evaluation.text_loss.evaluate`.

    Returns:
        lm-eval's results, as it writes them to files, with `"parscale"`: `num_streams` (P as the model ran), `streams`
        (the name of its set, or `"off"`), `versions` of packages, and with `adaptive` that and its `mean_streams`, over
        all positions of each batch from its first answer on. Can be written as JSON.

    Raises:
        ValueError: lm-eval is missing, a number is out of range, a task does not exist or cannot be loaded, or it runs
            the model's code without permission.
        OSError: the data of a task is not available.
    """
    _check_numbers(num_fewshot, limit, batch_size)
    positions, _ = text_positions(model)
    if sequence_length is None and positions < math.inf:
        sequence_length = int(positions)
    length = None if sequence_length is None else checked_length(model, sequence_length)
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ValueError(f"There is no folder {include_path}; give a folder with task files (.yaml).")
        _warn_of_code(Path(include_path), [path for path in Path(include_path).rglob("*") if path.suffix in _YAML])
    try:
        from lm_eval import simple_evaluate
        from lm_eval.utils import handle_non_serializable
    except ImportError as error:
        raise ValueError(f"Tasks need the package lm-eval: pip install 'parscale[eval]'. ({error})") from error

    with contextlib.redirect_stdout(sys.stderr), evaluating(model), only_known_ids(model):
        manager = _task_manager(tasks, include_path, model.name_or_path or "", confirm_run_unsafe_code)
        names = _known(tasks, manager)
        with _quiet("lm_eval.models.huggingface"):  # it warns of being given a model and not a name
            lm = harness_model(model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=length)
        try:
            with adapting(model, adaptive) as chooser:
                results = simple_evaluate(
                    lm,
                    tasks=names,
                    num_fewshot=num_fewshot,
                    limit=limit,
                    batch_size=batch_size,
                    device=str(model.device),
                    task_manager=manager,
                    log_samples=False,
                    confirm_run_unsafe_code=confirm_run_unsafe_code,
                )
        except AssertionError as error:  # how lm-eval reports a task that does not fit the model
            if not str(error):
                raise
            raise ValueError(f"lm-eval cannot run {', '.join(tasks)} on this model: {error}") from error
    assert results is not None  # None only on other processes
    written: dict[str, Any] = json.loads(json.dumps(results, default=handle_non_serializable))
    measured = stamp(model, lm_eval=version("lm_eval"))
    if adaptive is not None and chooser is not None:
        measured |= {"adaptive": shown_threshold(adaptive), "mean_streams": chooser.mean_streams}
    return {"parscale": measured} | written


def stamp(model: object, **versions: str) -> dict[str, Any]:
    """What a result was measured with: the model's streams, and versions of packages.

    Args:
        model: wrapped or plain.
        **versions: of more packages.

    Returns:
        `num_streams` is P; `streams` is the active set's name, or `"off"` for the plain backbone; `versions` holds
        those of parscale, torch and transformers, and the given ones.
    """
    active = active_streams(model)
    return {
        "num_streams": 1 if active is None else active.num_streams,
        "streams": STREAMS_OFF if active is None else active.name,
        "versions": {"parscale": __version__, "torch": version("torch"), "transformers": version("transformers")}
        | versions,
    }


def scores(results: dict[str, Any]) -> list[tuple[str, str, str, float, float | None]]:
    """The figures of `evaluate_tasks`: task or group, metric, filter, value and standard error."""
    rows = []
    for task, figures in (results["results"] | results.get("groups", {})).items():
        for name, value in figures.items():
            metric, comma, answer_filter = name.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                error = figures.get(f"{metric}_stderr,{answer_filter}")
                error = error if isinstance(error, (int, float)) else None
                rows.append((task, metric, answer_filter, float(value), error))
    return rows


def _check_numbers(num_fewshot: int | None, limit: float | None, batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, and must be at least 1.")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot is {num_fewshot}, and must be at least 0.")
    if limit is not None and not (0 < limit < 1 or (1 <= limit < math.inf and float(limit).is_integer())):
        raise ValueError(f"limit is {limit:g}, and must be a number of questions, or a share of them between 0 and 1.")


def _task_manager(tasks: Sequence[str], include_path: str | Path | None, pretrained: str, confirmed: bool) -> Any:
    """lm-eval's index of tasks, whose `load` raises a `ValueError` that names the wrong task.

    If only files are requested, lm-eval's own tasks, which take seconds to index, are left out.
    """
    from lm_eval.tasks import TaskManager

    class Tasks(TaskManager):
        def load(self, task_list: Any) -> Any:
            try:
                loaded = super().load(task_list)
            except (ValueError, OSError):
                raise
            except Exception as error:  # whatever an invalid task file raises
                names = ", ".join(map(str, task_list))
                raise ValueError(f"The tasks {names} cannot be loaded: {type(error).__name__}: {error}") from error
            unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
            if unsafe and not confirmed:
                raise ValueError(
                    f"{', '.join(unsafe)} would run code that the model writes: allow it by --confirm-run-unsafe-code, "
                    "in a sandbox."
                )
            return loaded

    folders = [RECIPES, *([Path(include_path)] if include_path is not None else [])]
    by_name = not all(Path(name).suffix in _YAML for name in tasks)
    return Tasks(include_path=folders, include_defaults=by_name, metadata={"pretrained": pretrained})


def _known(tasks: Sequence[str], manager: Any) -> list[str]:
    """The names of the tasks, with patterns resolved, and paths.

    Raises:
        ValueError: no task is given, or a task does not exist.
    """
    found: dict[str, None] = {}
    for name in tasks:
        if Path(name).suffix in _YAML:
            found[str(_task_file(Path(name)))] = None
        elif matches := manager.match_tasks([name]):
            found.update(dict.fromkeys(matches))
        else:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise ValueError(
                f"lm-eval {version('lm_eval')} has no task {name!r}"
                + (f"; did you mean {' or '.join(near)}?" if near else ".")
                + " All names: lm-eval ls tasks. Tasks of your own: --include-path, or the path of a YAML file."
            )
    if not found:
        raise ValueError("No task was given; give at least one name.")
    return list(found)


def _task_file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a task file, or a task's name.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: byte {error.start} cannot be read.") from error
    if re.search(r"^group:", text, re.MULTILINE):  # lm-eval accepts only single tasks by path
        raise ValueError(f"{path} describes a group; give its folder as --include-path, and its name as the task.")
    _warn_of_code(path, [path])
    return path


def _warn_of_code(given: Path, files: Sequence[Path]) -> None:
    """Warns, before lm-eval reads task files, that they can run code, and lists the functions that they name."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files if path.is_file()]
    functions = sorted({name for text in texts for name in re.findall(r"!function\s+[\"']?([\w./-]+)", text)})
    named = f" It names {', '.join(functions[:3])}{' and more' if len(functions) > 3 else ''}." if functions else ""
    warnings.warn(
        f"lm-eval runs code that task files contain or name, with and without --confirm-run-unsafe-code: read {given} "
        f"first if others wrote it.{named}",
        stacklevel=3,
    )


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """In this block a logger reports errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
