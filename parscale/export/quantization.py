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
    _part_gemms(model.graph)
    _part_experts(model.graph)
    quantizer = MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=BLOCK,
        accuracy_level=INT8_PRODUCTS,
        nodes_to_exclude=[*keep, *_batched_products(model.graph)],
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


def _part_gemms(graph: Any) -> None:
    """Makes a product and a sum of each `Gemm`, which torch writes for rows `(N, in)`: the quantizer takes products."""
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    transposed: dict[str, str] = {}
    for position, node in reversed(list(enumerate(graph.node))):
        options = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        scaled = options.get("alpha", 1) != 1 or options.get("beta", 1) != 1 or options.get("transA", 0)
        if node.op_type != "Gemm" or node.input[1] not in constants or scaled:
            continue
        rows, matrix, *bias = node.input
        if options.get("transB", 0):
            if matrix not in transposed:
                transposed[matrix] = f"{matrix}.transposed"
                array = np.ascontiguousarray(numpy_helper.to_array(constants[matrix]).T)
                graph.initializer.append(numpy_helper.from_array(array, transposed[matrix]))
            matrix = transposed[matrix]
        result = node.output[0]
        product = f"{result}.product" if bias else result
        node.CopyFrom(helper.make_node("MatMul", [rows, matrix], [product], name=node.name))  # by which it may be kept
        if bias:
            graph.node.insert(position + 1, helper.make_node("Add", [product, *bias], [result]))
    _remove_unused(graph, [constants[name] for name in transposed])


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
    _remove_unused(graph, [constants[name] for name in parted])


def _remove_unused(graph: Any, constants: Sequence[Any]) -> None:
    used = {name for node in graph.node for name in node.input}
    for tensor in constants:
        if tensor.name not in used:
            graph.initializer.remove(tensor)


def _batched_products(graph: Any) -> list[str]:
    """The names of products with a matrix for each stream, also where one stream alone has one: `(1, in, out)`."""
    batched = {tensor.name for tensor in graph.initializer if len(tensor.dims) > 2}
    return [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in batched]


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
