"""Weights in 8 and 4 bits cost a model with streams no more than they cost the plain one."""

import functools
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM

import parscale
from parscale.checkpoints.small_model import small_model_path
from parscale.export.decoder import cache_shape
from parscale.export.graph import write_graph
from parscale.export.onnx import export_onnx
from parscale.export.quantization import quantize

# Of a product's result: weights, and in both cases activations, rounded to this many bits in blocks of 32.
PER_PRODUCT = {8: 0.01, 4: 0.1}
TEXT = [__file__, onnx.__file__, np.__file__]  # Python, which the small model was trained on


def logits(session, zoo):
    ids = zoo.token_ids(2, 20).numpy()
    return session.step(ids, np.ones_like(ids), session.cache(2))[0]


def distance(found, expected):
    return np.abs(found - expected).mean() / np.abs(expected).mean()


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
    plain, found = logits(runtime(path.parent), zoo), logits(runtime(folder), zoo)
    assert 0 < distance(found, plain) < PER_PRODUCT[bits] * len(quantized) ** 0.5


def test_linear_layers_on_rows_without_a_batch_are_quantized(saved, tmp_path, runtime, zoo):
    """All of GPT-2's, whose `Conv1D` torch writes as `Gemm`."""
    model, _ = saved("gpt2", 2)
    exact = write_graph(model, cache_shape(model), tmp_path / "model.onnx", {"parscale": parscale.__version__})
    before = {each.name for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    quantize(tmp_path / "model.onnx", 4, exact)
    graph = onnx.load(tmp_path / "model.onnx").graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("MatMulNBits") == 2 * 4 + 1  # in each layer two of attention and two behind it; the head
    assert "Gemm" not in operators
    kept = [each for each in graph.initializer if each.name in before and each.data_type != onnx.TensorProto.INT64]
    shapes = [tuple(each.dims) for each in kept if len(each.dims) == 2]
    tables = [(1024, 32), (zoo.VOCABULARY, 32)]  # of positions and tokens
    assert sorted(shapes) == sorted([(32, 2), (2 * 32, 32), *tables])  # the aggregator
    with torch.no_grad():
        expected = model(zoo.token_ids(2, 20)).logits.numpy()
    assert 0 < distance(logits(runtime(tmp_path), zoo), expected) < PER_PRODUCT[4] * 9**0.5


def test_a_gemm_becomes_the_same_product_and_sum(tmp_path):
    """With and without bias, transposed and not; one that scales its result is left as it is."""
    rng = np.random.default_rng(0)
    square, wide, bias, rows = (rng.standard_normal(size, np.float32) for size in ((32, 32), (64, 32), (64,), (3, 32)))
    gemm = functools.partial(onnx.helper.make_node, "Gemm")
    nodes = [
        gemm(["rows", "square"], ["first"], name="first"),
        gemm(["first", "square"], ["second"], name="second", transB=1),
        gemm(["second", "square"], ["third"], name="third", alpha=2.0),
        gemm(["third", "wide", "bias"], ["kept"], name="kept", transB=1),
        gemm(["third", "wide", "bias"], ["rounded"], name="rounded", transB=1),
    ]
    value = functools.partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT)
    outputs = [value("kept", shape=[3, 64]), value("rounded", shape=[3, 64])]
    constants = {"square": square, "wide": wide, "bias": bias}
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = onnx.helper.make_graph(nodes, "gemms", [value("rows", shape=[3, 32])], outputs, tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    path = tmp_path / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    quantize(path, 8, ["first", "second", "third", "kept"])
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert sorted(operators) == ["Add", "Add", "Gemm", "MatMul", "MatMul", "MatMul", "MatMulNBits"]
    kept, rounded = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"rows": rows})
    rows, square, wide = (each.astype(np.float64) for each in (rows, square, wide))
    expected = 2 * rows @ square @ square.T @ square @ wide.T + bias
    assert distance(kept, expected) < 4 * 32 * 2**-24  # of four products of 32 numbers
    assert 0 < distance(rounded, expected) < PER_PRODUCT[8]


def test_low_rank_differences_of_one_stream_are_not_quantized(saved, tmp_path):
    """Of two streams that share keys one alone has them: matrices `(1, in, out)`, which the quantizer would take."""
    model, _ = saved("llama", 2, "shared", "lora")
    exact = write_graph(model, cache_shape(model), tmp_path / "model.onnx", {"parscale": parscale.__version__})
    before = {each.name: each for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    quantize(tmp_path / "model.onnx", 4, exact)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert len([node for node in graph.node if node.op_type == "MatMulNBits"]) == 7 + 1
    after = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    differences = [name for name, each in before.items() if len(each.dims) == 3 and each.dims[0] == 1]
    products = [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in differences]
    assert len(products) == 2 * 5  # two at each linear layer but those of keys and values
    assert all(np.array_equal(after[name], onnx.numpy_helper.to_array(before[name])) for name in differences)


def test_a_gate_module_that_chooses_experts_is_not_quantized(tmp_path):
    """HunYuan's is a `Gate` with a linear layer."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8, "vocab_size": 64}
    config = HunYuanMoEV1Config(num_hidden_layers=1, num_experts=5, moe_topk=2, max_position_embeddings=64, **sizes)
    model, path = HunYuanMoEV1ForCausalLM(config).eval(), tmp_path / "model.onnx"
    exact = write_graph(model, cache_shape(model), path, {"parscale": parscale.__version__})
    quantize(path, 4, exact)
    graph = onnx.load(path).graph
    (gate,) = (each for each in graph.initializer if list(each.dims) == [32, 5])
    assert np.array_equal(onnx.numpy_helper.to_array(gate), model.model.layers[0].mlp.gate.wg.weight.detach().numpy().T)
    quantized = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(quantized) == 4 + 3 + 5 * 2 + 1  # attention, the shared expert, five experts, the head


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
    plain, found = logits(runtime(tmp_path / "plain"), zoo), logits(runtime(tmp_path / "quantized"), zoo)
    assert 0 < distance(found, plain) < PER_PRODUCT[8] * len(quantized) ** 0.5


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
