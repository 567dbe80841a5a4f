"""The ONNX graph of a decoder, by `torch.onnx.export`."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from parscale.errors import UnsupportedModelError
from parscale.export.decoder import CacheShape, Decoder
from parscale.export.experts import translations
from parscale.streams.brief_runs import is_machine_error, one_line

OPSET = 18
WEIGHTS_SUFFIX = ".data"  # of the file of weights beside a graph
INPUTS = ("input_ids", "attention_mask")
PAST, PRESENT = "past_key_values.{}.{}", "present.{}.{}"  # by layer, and "key" or "value"
LOGITS = "logits"

_CLASSES = "pkg.torch.onnx.class_hierarchy"  # the classes of the modules that a node comes from, as torch notes them
_PATHS = "pkg.torch.onnx.name_scopes"  # and their names in the model
# Products that are never quantized are those of such classes, and of what is called `gate` or `router` in a model.
_EXACT = re.compile(r"Aggregator|Router|\.(gate|router\w*)\b")


def cache_names(pattern: str, layers: int) -> list[str]:
    """The names of a cache's tensors, in the order of the graph's inputs or outputs."""
    return [pattern.format(layer, part) for layer in range(layers) for part in ("key", "value")]


@torch.no_grad()
def write_graph(model: Any, shape: CacheShape, path: Path, provenance: Mapping[str, str]) -> list[str]:
    """Writes a model as an ONNX graph, with its weights in a file beside it.

    Args:
        model: wrapped or plain, on a CPU.
        shape: of its cache.
        path: of the graph.
        provenance: goes into its metadata.

    Returns:
        The names of the nodes that are never quantized: they mix the streams or choose experts.

    Raises:
        UnsupportedModelError: torch cannot export it.
    """
    program = _program(model, shape)
    graph = program.model
    modules = {
        str(node.name): " ".join(node.metadata_props.get(key, "") for key in (_CLASSES, _PATHS)) for node in graph.graph
    }
    exact = [name for name, of_node in modules.items() if _EXACT.search(of_node)]
    for node in graph.graph:
        node.metadata_props.clear()  # places in source files
    graph.metadata_props.clear()
    graph.metadata_props.update(provenance)
    graph.producer_name, graph.producer_version = "parscale", provenance["parscale"]
    program.save(path, external_data=True)
    return exact


def _program(model: Any, shape: CacheShape) -> Any:
    rows, tokens, seen = 2, 3, 5  # neither 0 nor 1, which torch.export takes for constants, and all different
    arguments = (
        torch.zeros(rows, tokens, dtype=torch.long),
        torch.ones(rows, seen + tokens, dtype=torch.long),
        shape.empty(rows, seen, model.dtype),
    )
    past = {0: "batch", 2: "past"}
    sizes = ({0: "batch", 1: "sequence"}, {0: "batch", 1: "total"}, [(past, past)] * shape.layers)
    try:
        with _without_hints():
            return torch.onnx.export(
                Decoder(model, shape).eval(),
                arguments,
                dynamo=True,
                dynamic_shapes=sizes,
                input_names=[*INPUTS, *cache_names(PAST, shape.layers)],
                output_names=[LOGITS, *cache_names(PRESENT, shape.layers)],
                opset_version=OPSET,
                custom_translation_table=translations(),
                verbose=False,
            )
    except Exception as error:  # whatever the exporter meets in a model
        cause = error.__cause__ or error
        if is_machine_error(error) or is_machine_error(cause):
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be exported: torch.onnx.export makes no graph of it "
            f"({type(cause).__name__}: {one_line(cause)})."
        ) from error


@contextlib.contextmanager
def _without_hints() -> Iterator[None]:
    """In this block torch and ONNX IR give no hints: of a size with two names, torchvision, an empty attribute.

    Where torch refuses a model it prints the graph so far, hundreds of lines; its reason is in the error.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
