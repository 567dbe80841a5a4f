"""A quantized model has as many parameters as the model that was quantized, in memory and in files."""

import re

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, QuantoConfig, TorchAoConfig

from parscale import wrap
from parscale.checkpoints.description import describe
from parscale.format.counting import parameter_sizes
from parscale.format.headers import StoredTensor
from parscale.format.packed import stored_sizes


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with a backbone whose layers every library can quantize."""
    folder = tmp_path_factory.mktemp("plain") / "backbone"
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parameters(plain):
    return sum(parameter.numel() for parameter in LlamaForCausalLM.from_pretrained(plain).parameters())


def bitsandbytes(**options):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**options)


def torchao(name, **options):
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(getattr(quantization, name)(**options))


def quanto(weights):
    pytest.importorskip("optimum.quanto")
    return QuantoConfig(weights=weights)


QUANTIZED = {
    "nf4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4, scales quantized too": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_use_double_quant=True),
    "nf4 in bfloat16": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16),
    "8 bits": lambda: bitsandbytes(load_in_8bit=True),
    "torchao, 8 bits": lambda: torchao("Int8WeightOnlyConfig", version=2),  # 0.16 cannot save its version 1
    "torchao, 4 bits": lambda: torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "quanto, 8 bits": lambda: quanto("int8"),
}


def printed(model, capsys):
    """Trained, all, and by where they are."""
    model.print_trainable_parameters()
    line = capsys.readouterr().out
    trained, total = (int(number.replace(",", "")) for number in re.findall(r"params: ([\d,]+) \|\|", line))
    parts = {name: int(n.replace(",", "")) for name, n in re.findall(r"(\w+): ([\d,]+)(?=[,)])", line)}
    return trained, total, parts


@pytest.mark.parametrize("quantization", QUANTIZED.values(), ids=QUANTIZED)
def test_a_quantized_backbone(plain, parameters, quantization, capsys):
    model = LlamaForCausalLM.from_pretrained(plain, quantization_config=quantization(), device_map={"": "cpu"})
    assert sum(parameter_sizes(model).values()) == parameters
    wrap(model, 2, prefix_length=3, init="random").freeze_backbone()
    streams = sum(tensor.numel() for tensor in model.parscale.tensors(model.parscale.active).values())
    trained, total, parts = printed(model, capsys)
    assert (trained, total) == (streams, parameters + streams)
    assert parts["others"] == 0
    assert parts["prefixes"] + parts["aggregator"] == streams


@pytest.mark.parametrize("weights", ["int2", "int4"])
def test_packed_tensors_that_say_their_shape(plain, parameters, weights):
    """Run, they would have quanto compile its kernels, which takes minutes."""
    model = LlamaForCausalLM.from_pretrained(plain, quantization_config=quanto(weights), device_map={"": "cpu"})
    assert sum(parameter_sizes(model).values()) == parameters


@pytest.mark.parametrize("name", ["nf4", "fp4, scales quantized too", "nf4 in bfloat16", "torchao, 8 bits"])
def test_info_of_a_quantized_checkpoint(plain, parameters, name, tmp_path):
    quantization = QUANTIZED[name]()
    model = LlamaForCausalLM.from_pretrained(plain, quantization_config=quantization, device_map={"": "cpu"})
    model.save_pretrained(tmp_path / "quantized")
    assert describe(str(tmp_path / "quantized"))["parameters"]["backbone"] == parameters
    wrap(model, 2, prefix_length=3, init="random").save_pretrained(tmp_path / "full")
    said = describe(str(tmp_path / "full"))["parameters"]
    assert said["backbone"] == parameters
    assert said["prefixes"] == 2 * 2 * 2 * 3 * 64


def test_what_peft_counts_in_4_bits(plain, parameters):
    peft = pytest.importorskip("peft")
    quantization = QUANTIZED["nf4"]()
    model = LlamaForCausalLM.from_pretrained(plain, quantization_config=quantization, device_map={"": "cpu"})
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
    trained, total = adapted.get_nb_trainable_parameters()
    sizes = parameter_sizes(adapted)
    assert sum(sizes.values()) == total == parameters + trained
    assert sum(size for tensor, size in sizes.items() if tensor.requires_grad) == trained


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_hqq(bits):
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=64)
    layer = quantize.HQQLinear(nn.Linear(128, 192, bias=True), config, compute_dtype=torch.float32, device="cpu")
    assert layer.W_q.numel() < 128 * 192 or bits == 8
    counted = {id(tensor): size for tensor, size in parameter_sizes(layer).items()}
    assert counted[id(layer.W_q)] == 128 * 192
    assert sum(counted.values()) in (128 * 192, 128 * 192 + 192)  # the bias is a parameter, or none to torch


def packed_layer(inputs, outputs, bits, features="in_features out_features"):
    """A linear layer as the kernels of GPTQ and AWQ keep it: integers of 32 bits, scales, zero points, all buffers."""
    layer = nn.Module()
    for name, value in zip(features.split(), (inputs, outputs), strict=True):
        setattr(layer, name, value)
    layer.register_buffer("qweight", torch.zeros(inputs * bits // 32, outputs, dtype=torch.int32))
    layer.register_buffer("qzeros", torch.zeros(inputs // 128, outputs * bits // 32, dtype=torch.int32))
    layer.register_buffer("scales", torch.ones(inputs // 128, outputs, dtype=torch.float16))
    layer.register_buffer("g_idx", torch.zeros(inputs, dtype=torch.int32))
    return layer


@pytest.mark.parametrize("features", ["in_features out_features", "infeatures outfeatures"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_packed_into_integers(bits, features):
    layer = packed_layer(256, 96, bits, features)
    assert sum(parameter_sizes(nn.Sequential(layer, nn.LayerNorm(8))).values()) == 256 * 96 + 16
    stored = {
        f"layer.{name}": StoredTensor("", {torch.int32: "I32", torch.float16: "F16"}[buffer.dtype], tuple(buffer.shape))
        for name, buffer in layer.named_buffers()
    }
    assert stored_sizes(stored, {"quant_method": "gptq", "bits": bits}) == {"layer.qweight": 256 * 96}


def test_weights_packed_by_compressed_tensors():
    layer = nn.Module()
    layer.weight_packed = nn.Parameter(torch.zeros(96, 256 // 8, dtype=torch.int32), requires_grad=False)
    layer.weight_scale = nn.Parameter(torch.ones(96, 2))
    layer.register_buffer("weight_shape", torch.tensor([96, 256]))
    assert sum(parameter_sizes(layer).values()) == 96 * 256
    stored = {
        "layer.weight_packed": StoredTensor("", "I32", (96, 32)),
        "layer.weight_scale": StoredTensor("", "F32", (96, 2)),
        "layer.weight_shape": StoredTensor("", "I64", (2,)),
        "norm.weight": StoredTensor("", "F32", (16,)),
    }
    quantization = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}
    assert sum(stored_sizes(stored, quantization).values()) == 96 * 256 + 16


def test_experts_in_blocks_of_4_bits():
    experts = nn.Module()
    experts.gate_up_proj_blocks = nn.Parameter(torch.zeros(2, 64, 4, 16, dtype=torch.uint8), requires_grad=False)
    experts.gate_up_proj_scales = nn.Parameter(torch.zeros(2, 64, 4, dtype=torch.uint8), requires_grad=False)
    experts.gate_up_proj_bias = nn.Parameter(torch.zeros(2, 64))
    assert sum(parameter_sizes(experts).values()) == 2 * 64 * (4 * 32) + 2 * 64
    stored = {f"experts.{name}": StoredTensor("", "U8", tuple(p.shape)) for name, p in experts.named_parameters()}
    assert sum(stored_sizes(stored, {"quant_method": "mxfp4"}).values()) == 2 * 64 * (4 * 32) + 2 * 64


def test_shared_and_partitioned_tensors():
    layer = nn.Linear(4, 4, bias=False)
    assert sum(parameter_sizes(nn.ModuleList([layer, layer])).values()) == 16
    layer.weight.data = torch.empty(0)
    layer.weight.ds_shape = torch.Size([4, 4])  # as DeepSpeed leaves what other processes hold
    assert sum(parameter_sizes(layer).values()) == 16


@pytest.mark.parametrize(
    "quantization", [None, "gptq", 4, {"bits": "4"}, {"bits": True}, {"config_groups": [4]}], ids=str
)
def test_a_configuration_that_says_no_number_of_bits(quantization):
    stored = {"layer.qweight": StoredTensor("", "I32", (8, 4))}
    assert sum(stored_sizes(stored, quantization).values()) == 32
