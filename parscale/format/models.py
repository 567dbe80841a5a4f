"""Loads models with transformers, after the files and the configuration of a checkpoint have been checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from parscale.compat.transformers import loading_reports
from parscale.format.architectures import backbone_class, backbone_config, class_read_by
from parscale.format.checks import check_size, differences
from parscale.format.folders import CONFIG, Checkpoint
from parscale.format.headers import StoredTensor
from parscale.format.pretrained import read_pretrained, warn_of_adapter
from parscale.format.values import check_values, configuration_of
from parscale.streams.naming import is_of_streams

# The errors that transformers raises for a field of the wrong type.
FAULTS = (ArithmeticError, AttributeError, LookupError)
# Patterns in transformers' messages about tensors that do not fit.
_REPORTS = "ignore_mismatched_sizes|conversion of the weights|in loading state_dict"


def read_config(checkpoint: Checkpoint, fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Any:
    """The configuration of a full checkpoint or of a plain model.

    Args:
        checkpoint: the folder or repository.
        fields: of its `config.json`.
        tensors: the tensors in its files.

    Raises:
        ValueError: it is damaged.
    """
    check_values(checkpoint, fields, tensors)
    with configuration_of(checkpoint):
        return read_pretrained(AutoConfig, checkpoint.name, **checkpoint.hub)


def load_plain_model(checkpoint: Checkpoint, reader: object, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Loads a model without streams, after its files and configuration have been checked; also returns the report.

    Args:
        checkpoint: of the model.
        reader: an `AutoModel...` or the model's class.
        **options: passed to `from_pretrained`.

    Raises:
        ValueError: the checkpoint is damaged, or needs its own code.
        OSError: a file does not exist or cannot be read.
    """
    tensors = checkpoint.weights(options.get("variant"))
    config = read_config(checkpoint, checkpoint.read_json(CONFIG), tensors)
    cls = class_read_by(reader, config)
    if cls is not None and getattr(config, "quantization_config", None) is None:
        check_size(checkpoint, cls, config, tensors)
    warn_of_adapter(checkpoint)
    return read_pretrained(reader, checkpoint.name, output_loading_info=True, **checkpoint.hub | options)


def load_backbone(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    tensors: Mapping[str, StoredTensor],
    *model_args: Any,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Loads the plain backbone of a full checkpoint by its class's `from_pretrained`; also returns the report."""
    if kwargs.setdefault("use_safetensors", True) is False:
        raise ValueError("parscale reads safetensors only: omit use_safetensors=False.")
    plain = backbone_config(config)
    plain.__dict__.pop("transformers_weights", None)  # it could name other files than those that were checked
    cls = backbone_class(config, plain)
    plain.architectures = [cls.__name__]
    if getattr(plain, "quantization_config", None) is None:
        check_size(checkpoint, cls, plain, tensors)
    tolerant = kwargs.get("ignore_mismatched_sizes", False)
    with _reports(shown=tolerant) as reports:
        try:
            with configuration_of(checkpoint, FAULTS):
                options = checkpoint.hub | kwargs | {"config": plain, "output_loading_info": True}
                model, info = read_pretrained(cls, checkpoint.name, *model_args, **options)
        except RuntimeError as error:
            if re.search(_REPORTS, str(error)) is None:
                raise
            found = differences(checkpoint, cls, plain, tensors)[:3] or reports or [str(error)]
            raise ValueError(f"The tensors of {checkpoint} do not fit its {CONFIG}: {'; '.join(found)}.") from error
    info["unexpected_keys"] = {key for key in info["unexpected_keys"] if not is_of_streams(key)}
    problems = [f"{key} is missing" for key in sorted(info["missing_keys"])]
    problems += [f"{key} is unknown" for key in sorted(info["unexpected_keys"])]
    if problems and not tolerant:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"The tensors of {checkpoint} are not those of a {cls.__name__}: {'; '.join(problems[:3])}{more}. "
            "The checkpoint is damaged: copy or save it again."
        )
    return model, info


@contextmanager
def _reports(*, shown: bool) -> Iterator[list[str]]:
    """In this block transformers' tables of tensors that do not fit go into a list, for a short error message.

    Args:
        shown: also log them, without the rows of streams, which the backbone's class does not expect.
    """
    reports: list[str] = []

    def keep(report: str) -> str | None:
        lines = [line for line in report.splitlines() if not is_of_streams(line.partition("|")[0].strip())]
        reports.append("\n".join(lines))
        rows = sum("|" in line for line in lines) - 1  # without the table's header
        return reports[-1] if shown and rows else None

    with loading_reports(keep):
        yield reports
