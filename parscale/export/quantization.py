"""A graph's weights in 8 or 4 bits, by ONNX Runtime's own quantizer.

Products with a constant matrix are quantized in blocks of 32 numbers, the head among them (operator `MatMulNBits`). The
aggregator and what differs between streams stay in floating point. The table of embeddings is kept in float16.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parscale.export.graph import WEIGHTS_SUFFIX

BLOCK = 32
INT8_PRODUCTS = 4  # of MatMulNBits' levels of accuracy: activations are rounded to 8 bits


def quantize(path: Path, bits: int, keep: Sequence[str]) -> None:
    """Replaces a float32 graph by one with quantized weights.

    Args:
        path: of the graph; its weights are in the file beside it.
        bits: 8 or 4.
        keep: names of nodes that stay in floating point.
    """
    import onnx

    with _logging_as_before():  # the import sets up logging for the whole process
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = onnx.load(path)
    path.with_name(path.name + WEIGHTS_SUFFIX).unlink()
    _transpose_constants(model.graph)
    _part_experts(model.graph)
    quantizer = MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=BLOCK,
        accuracy_level=INT8_PRODUCTS,
        nodes_to_exclude=list(keep),
    )
    quantizer.process()
    model = quantizer.model.model
    _halve_tables(model.graph)
    onnx.save_model(
        model, path, save_as_external_data=True, location=path.name + WEIGHTS_SUFFIX, all_tensors_to_one_file=True
    )


def _transpose_constants(graph: Any) -> None:
    """Transposes tied weights here, which the graph reads both ways: the quantizer takes constants only."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in constants]:
        order = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), None)
        array = numpy_helper.to_array(constants[node.input[0]]).transpose(order)
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), node.output[0]))
        graph.node.remove(node)


def _part_experts(graph: Any) -> None:
    """Makes each expert's matrix a constant of its own, in place of a part of the constant of all experts."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    parted: dict[str, Any] = {}
    for node in [node for node in graph.node if node.op_type == "Gather"]:
        experts, expert = (constants.get(name) for name in node.input)
        if experts is None or expert is None or len(experts.dims) != 3 or expert.dims:
            continue
        parted.setdefault(experts.name, numpy_helper.to_array(experts))
        matrix = parted[experts.name][int(numpy_helper.to_array(expert))]
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(matrix), node.output[0]))
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for name in parted.keys() - used:
        graph.initializer.remove(constants[name])


def _halve_tables(graph: Any) -> None:
    """Keeps tables that rows are taken from (embeddings) in float16."""
    from onnx import TensorProto, helper, numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    used = [name for node in graph.node for name in node.input]
    for position, node in reversed(list(enumerate(graph.node))):
        table = constants.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or table.data_type != TensorProto.FLOAT or len(table.dims) != 2 or used.count(table.name) > 1:
            continue
        table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table).astype(np.float16), table.name))
        rows = f"{node.output[0]}_float16"
        cast = helper.make_node("Cast", [rows], [node.output[0]], to=TensorProto.FLOAT)
        node.output[0] = rows
        graph.node.insert(position + 1, cast)


@contextlib.contextmanager
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
