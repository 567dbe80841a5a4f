"""Conversion: loads a model's checkpoint, adds parallel streams, and saves it with its tokenizer or processor."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from parscale import ParScaleConfig, wrap
from parscale.checkpoints.description import describe, describe_streams
from parscale.checkpoints.finite_values import first_not_finite
from parscale.checkpoints.models import copy_processor, find_tokenizer, load_plain, require_tokenizer
from parscale.checkpoints.texts.documents import Document
from parscale.checkpoints.texts.sources import read_documents
from parscale.checkpoints.texts.token_ids import encode, vocabulary_of
from parscale.config import TEXT_INITS
from parscale.format.folders import CONFIG, FULL, PLAIN, STREAMS_CONFIG, STREAMS_ONLY, Checkpoint
from parscale.format.staging import require_new_folder, staged
from parscale.streams.naming import LABELS, TRANSFORM_PART, part_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    source: str,
    output: str | Path,
    config: ParScaleConfig,
    *,
    calibration_files: Sequence[Path] = (),
    text_column: str = "text",
    streams_only: bool = False,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Adds P streams to a saved model and saves it, by default in the dtype that it was saved in.

    Args:
        source: the backbone's folder, or its name on the Hugging Face Hub.
        output: the folder to write, new or empty; it appears only when it is complete.
        config: the configuration of the streams. A seed makes random choices repeatable.
        calibration_files: text files for every init but `"random"`, where streams start from text: each from a
            different piece of `config.prefix_length` tokens, spread evenly over the text. Without them the backbone
            samples the texts.
        text_column: the column that holds the text, in JSON, JSON Lines, CSV and tables.
        streams_only: write the streams and the backbone's name instead of a full checkpoint.
        dtype: of backbone and streams in the full checkpoint: `"float32"`, in which no training step is rounded away,
            `"bfloat16"` or `"float16"`.

    Returns:
        A report that can be written as JSON: what was read and written, how many parameters it has, how many bytes it
        takes on disk, and the seconds it took.

    Raises:
        ValueError: `source` is damaged or already has streams, `output` is not empty, a number is out of range, there
            is too little calibration text, or `dtype` is unknown, too narrow for the backbone's values, or given with
            `streams_only`.
        OSError: the source does not exist, the output cannot be written, or another process is writing it.
    """
    start = time.perf_counter()
    _check_dtype(dtype, streams_only)
    if calibration_files and config.init not in (None, *TEXT_INITS):
        readers = " or ".join(map(repr, TEXT_INITS))
        raise ValueError(f"Calibration text is for init {readers}, but init is {config.init!r}; omit one of them.")
    if calibration_files and config.num_streams == 1:
        raise ValueError("Calibration text is for streams that start from it, and one stream is the backbone; omit it.")
    documents = read_documents(calibration_files, text_column=text_column)
    require_new_folder(output)
    if (kind := Checkpoint(source).kind()) != PLAIN:
        what = describe(source)
        if what["num_streams"] == 1 and not what["further_streams"]:
            raise ValueError(
                f"{source} was made with one stream, which is its backbone alone. Write that as a plain model, put the "
                "tokenizer's files into its folder, and convert it: "
                f"parscale.unwrap(parscale.load({source!r})).save_pretrained(FOLDER)"
            )
        raise ValueError(f"{source} already has streams ({kind}); give a plain model, such as its backbone.")
    with staged(output, last=STREAMS_CONFIG if streams_only else CONFIG, new=True) as folder:
        tokenizer = find_tokenizer(source)
        model = load_plain(source, any_task=True, dtype=None if dtype is None else DTYPES[dtype])
        if (name := first_not_finite(model.named_parameters())) is not None:
            if dtype == "float16":
                raise ValueError(
                    f"{name} of {source} has values that are too large for float16, or not finite: give dtype "
                    "'bfloat16' or 'float32', or leave it out."
                )
            raise ValueError(f"{name} of {source} holds values that are not finite: {source} is damaged.")
        calibration = None
        if documents:
            calibration = calibration_ids(
                documents,
                require_tokenizer(tokenizer, source),
                config.num_transformed,
                config.prefix_length,
                vocabulary=vocabulary_of(model),
            )
        backbone_parameters = _count(model.parameters())
        wrap(model, config, calibration=calibration)
        if (name := first_not_finite(model.parscale.tensors(model.parscale.active).items())) is not None:
            raise ValueError(f"{name} would start with values that are not finite: {source} is damaged.")
        if streams_only:
            model.save_streams(folder)
        else:
            model.save_pretrained(folder)
        copy_processor(source, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "source": source,
        "output": str(output),
        "kind": STREAMS_ONLY if streams_only else FULL,
        "backbone": type(model).__name__,
        **describe_streams(model.parscale.active.config),
        "calibration": [name for name, _ in documents],
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokenizer": tokenizer is not None,
        "parameters": {"backbone": backbone_parameters, **_parameters_of_streams(model, config)},
        "bytes": size,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _check_dtype(dtype: str | None, streams_only: bool) -> None:
    """Refuses a dtype that is unknown, or that no file would keep."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, and must be {', '.join(map(repr, DTYPES))}; without it, the source's.")
    if dtype is not None and streams_only:
        raise ValueError(
            f"dtype is {dtype!r}, but streams alone get their backbone's dtype when they are loaded; leave one of "
            "dtype and streams_only out."
        )


def _parameters_of_streams(model: Any, config: ParScaleConfig) -> dict[str, int]:
    """How many parameters make the streams differ, and how many mix them."""
    streams = model.parscale.tensors(model.parscale.active)
    differing = _count(tensor for name, tensor in streams.items() if part_of(name) == TRANSFORM_PART)
    return {LABELS[config.transform]: differing, "aggregator": _count(streams.values()) - differing}


def calibration_ids(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    num_streams: int,
    prefix_length: int,
    *,
    vocabulary: int | None = None,
) -> torch.Tensor:
    """P pieces of the documents' tokens, spread evenly over all documents in order.

    Args:
        documents: pairs of a name and a text.
        tokenizer: the model's tokenizer.
        num_streams: P, or the number of streams that start from a text.
        prefix_length: T.
        vocabulary: number of token ids that the model has; without it, ids are not checked.

    Returns:
        Token ids `(P, T)`.

    Raises:
        ValueError: there are fewer than P * T tokens, or as in `parscale.checkpoints.texts.token_ids.encode`.
    """
    encoded = encode(documents, tokenizer, vocabulary, add_special_tokens=False)
    ids = torch.tensor([token for document in encoded for token in document], dtype=torch.long)  # (N,)
    needed = num_streams * prefix_length
    if len(ids) < needed:
        raise ValueError(
            f"The calibration text holds {len(ids)} tokens, but {num_streams} streams of {prefix_length} tokens need "
            f"{needed}; give more text, fewer streams or a shorter prefix."
        )
    step = len(ids) // num_streams
    return torch.stack([ids[stream * step :][:prefix_length] for stream in range(num_streams)])


def _count(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
