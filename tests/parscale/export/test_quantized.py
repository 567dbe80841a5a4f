"""Weights in 8 and 4 bits cost a model with streams no more than they cost the plain one."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import parscale
from parscale.checkpoints.small_model import small_model_path
from parscale.export.decoder import cache_shape
from parscale.export.graph import write_graph
from parscale.export.onnx import export_onnx
from parscale.export.quantization import quantize

# Of a product's result: weights, and in both cases activations, rounded to this many bits in blocks of 32.
PER_PRODUCT = {8: 0.01, 4: 0.1}
TEXT = [__file__, onnx.__file__, np.__file__]  # Python, which the small model was trained on


@pytest.fixture(scope="module")
def tiny_graph(saved, tmp_path_factory):
    """The float32 graph of a Llama of one layer with two streams, and the names of the nodes that mix them."""
    model, _ = saved("llama", 2)
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    return path, write_graph(model, cache_shape(model), path, {"parscale": parscale.__version__})


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_quantized(bits, tiny_graph, tmp_path, runtime, zoo):
    """The products of the backbone and the head; not the aggregator, prefixes or embeddings."""
    path, mixing = tiny_graph
    folder = tmp_path / "quantized"
    shutil.copytree(path.parent, folder)
    quantize(folder / "model.onnx", bits, mixing)
    graph = onnx.load(folder / "model.onnx").graph
    quantized = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(quantized) == 7 + 1
    assert all({each.name: each.i for each in node.attribute}["bits"] == bits for node in quantized)
    before, after = (
        {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(place / "model.onnx").graph.initializer}
        for place in (path.parent, folder)
    )
    kept = {name: each for name, each in after.items() if name in before and np.array_equal(each, before[name])}
    shapes = [each.shape for each in kept.values()]
    assert shapes.count((2 * 32, 32)) == shapes.count((32, 2)) == 1  # the aggregator
    assert len([shape for shape in shapes if len(shape) == 5]) == 2  # prefixes, keys and values of the layer
    tables = [each.dtype for name, each in after.items() if each.shape == (zoo.VOCABULARY, 32)]
    assert tables == [np.float16]
    ids = zoo.token_ids(2, 20).numpy()
    plain, _ = (session := runtime(path.parent)).step(ids, np.ones_like(ids), session.cache(2))
    found, _ = (session := runtime(folder)).step(ids, np.ones_like(ids), session.cache(2))
    error = np.abs(found - plain).mean() / np.abs(plain).mean()
    assert 0 < error < PER_PRODUCT[bits] * len(quantized) ** 0.5


@pytest.mark.nightly
def test_experts_are_quantized_and_routers_are_not(saved, tmp_path, runtime, zoo):
    model, _ = saved("mixtral", 2)
    made_of = {"parscale": parscale.__version__}
    for name in ("plain", "quantized"):
        (tmp_path / name).mkdir()
        exact = write_graph(model, cache_shape(model), tmp_path / name / "model.onnx", made_of)
    quantize(tmp_path / "quantized" / "model.onnx", 8, exact)
    graph = onnx.load(tmp_path / "quantized" / "model.onnx").graph
    quantized = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(quantized) == 2 * (4 + 4 * 2) + 1  # in each layer attention and four experts; the head
    shapes = [tuple(each.dims) for each in graph.initializer if each.data_type == onnx.TensorProto.FLOAT]
    assert shapes.count((4, 32)) + shapes.count((32, 4)) == 2  # routers
    assert not [shape for shape in shapes if len(shape) == 3 and shape[0] == 4]  # all experts of a layer
    ids = zoo.token_ids(2, 20).numpy()
    plain, _ = (session := runtime(tmp_path / "plain")).step(ids, np.ones_like(ids), session.cache(2))
    found, _ = (session := runtime(tmp_path / "quantized")).step(ids, np.ones_like(ids), session.cache(2))
    error = np.abs(found - plain).mean() / np.abs(plain).mean()
    assert 0 < error < PER_PRODUCT[8] * len(quantized) ** 0.5


@pytest.mark.nightly
def test_loss_of_quantization_is_at_most_that_of_the_plain_model(tmp_path, runtime):
    tokenizer = AutoTokenizer.from_pretrained(small_model_path())
    pieces = [tokenizer(Path(name).read_text())["input_ids"][:256] for name in TEXT]
    ids = np.array([piece for piece in pieces if len(piece) == 256])
    assert len(ids) == len(TEXT)
    model = AutoModelForCausalLM.from_pretrained(small_model_path(), dtype=torch.float32)
    sources = {"plain": small_model_path(), "streams": tmp_path / "streams"}
    parscale.wrap(model, 2, prefix_length=16, seed=0).save_pretrained(sources["streams"])
    losses = {}
    for name, source in sources.items():
        for dtype in ("float32", "int8", "int4"):
            export_onnx(str(source), tmp_path / name / dtype, dtype=dtype)
            losses[name, dtype] = runtime(tmp_path / name / dtype).loss(ids)
    for dtype, noise in (("int8", 0.002), ("int4", 0.01)):  # of rounding, in nats on 765 tokens
        lost = {name: losses[name, dtype] - losses[name, "float32"] for name in sources}
        assert lost["streams"] <= max(lost["plain"], 0) + noise, losses
