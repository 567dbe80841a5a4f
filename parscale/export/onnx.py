"""A checkpoint as a folder that ONNX Runtime and ONNX Runtime GenAI run."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from parscale.attention.grouped import GROUPED, register_grouped
from parscale.checkpoints.models import open_checkpoint
from parscale.checkpoints.versions import versions
from parscale.config import OWN
from parscale.export.comparison import check_graph, sample
from parscale.export.decoder import CacheShape, cache_shape
from parscale.export.genai import GENAI_CONFIG, genai_config, longest_text
from parscale.export.graph import write_graph
from parscale.export.quantization import quantize
from parscale.format.staging import require_new_folder, staged
from parscale.streams.state import active_streams

Dtype = Literal["float32", "float16", "int8", "int4"]
GRAPH = "model.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(
    checkpoint: str, output: str | Path, *, dtype: Dtype = "float32", streams: str | None = None
) -> dict[str, Any]:
    """Write a checkpoint as an ONNX decoder with its cache, its tokenizer and `genai_config.json`.

    The graph is compared with the model before anything appears under `output`.

    Args:
        checkpoint: a folder, or a name on the Hugging Face Hub; with streams, or a plain model.
        output: the folder to write, new or empty; it appears only when it is whole.
        dtype: of the weights. `"int8"` and `"int4"` are for the weights of products alone, in blocks of 32.
        streams: the set of streams to export, or `"off"` for the plain backbone; by default the active set.

    Returns:
        A report that can be written as JSON.

    Raises:
        ValueError: a package is missing, the checkpoint is damaged or no causal language model, `output` holds
            something, or an unknown dtype.
        UnsupportedModelError: the model cannot be exported.
        OSError: there is no such checkpoint, or the output cannot be written.
    """
    start = time.perf_counter()
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be {', '.join(map(repr, get_args(Dtype)))}, got {dtype!r}.")
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ValueError(f"The export to ONNX needs {', '.join(missing)}: pip install 'parscale[onnx]'.")
    require_new_folder(output)
    with staged(output, last=GENAI_CONFIG, new=True) as folder:
        model, tokenizer = open_checkpoint(checkpoint, streams=streams, device="cpu")
        model.to(torch.float16 if dtype == "float16" else torch.float32)
        length = longest_text(model.config.get_text_config())  # before any work
        made_of = _described(model, checkpoint, dtype)
        shape = _write(model, folder / GRAPH, dtype, made_of)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        config = genai_config(model, shape, GRAPH, length)
        (folder / GENAI_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return made_of | {
        "output": str(output),
        "format": "onnx",
        "cache": {
            "layers": shape.layers,
            "heads": shape.copies * shape.heads,
            "head_size": shape.head_size,
        },
        "tokenizer": tokenizer is not None,
        "bytes": size,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _write(model: Any, path: Path, dtype: Dtype, made_of: dict[str, Any]) -> CacheShape:
    """The graph of a model, compared with it, in its dtype."""
    shape, known = cache_shape(model), sample(model)  # by the attention that the model has
    register_grouped()
    model.set_attn_implementation(GROUPED)
    place = Path(made_of["checkpoint"])
    named = {"checkpoint": place.name} if place.is_dir() else {}  # its name, not its path on this machine
    provenance = {name: str(value) for name, value in (made_of | named | versions()).items()}
    exact = write_graph(model, shape, path, provenance)
    check_graph(path, shape, known)
    if dtype in ("int8", "int4"):
        quantize(path, int(dtype.removeprefix("int")), exact)
    return shape


def _described(model: Any, checkpoint: str, dtype: Dtype) -> dict[str, Any]:
    """What the graph is made of."""
    active = active_streams(model)
    described: dict[str, Any] = {"checkpoint": checkpoint, "backbone": type(model).__name__, "dtype": dtype}
    if active is None or active.num_streams == 1:
        return described | {"num_streams": 1}
    config = active.config
    return described | {
        "streams": active.name,
        "num_streams": config.num_streams,
        "transform": config.transform,
        **({} if config.kv == OWN else {"kv": config.kv}),
        "smoothing": config.smoothing,
    }
