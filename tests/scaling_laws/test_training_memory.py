"""Counted training memory against what real models hold: parameters, gradients, states, kept tensors, the peak."""

import contextlib
import dataclasses
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from parscale import wrap
from parscale.scaling_laws import known_backbones, known_hardware, read_shape, training_memory

TRAINS = ("streams", "everything", "lora")
T, RANK, H, INNER = 4, 3, 64, 160


def build(kind, streams, layers, vocab, trains, dtype, checkpointing=False, tied=False):
    """A tiny model as it is trained: what trains in float32, what is frozen in `dtype`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=vocab,
        hidden_size=H,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
    )
    model = AutoModelForCausalLM.from_config(config).float()
    if streams > 1:
        wrap(model, streams, prefix_length=T, init="random", seed=0)
    trained = model
    if trains != "everything":
        if streams > 1:
            model.freeze_backbone()
        if trains == "lora":
            trained = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    if checkpointing:
        enable = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )  # newer name first
        enable({"use_reentrant": False})
    return trained.train()


def autocast(dtype):
    return torch.autocast("cpu", torch.bfloat16) if dtype == torch.bfloat16 else contextlib.nullcontext()


def batch(model, rows, length):
    return torch.randint(0, model.config.vocab_size, (rows, length))


def loss_of(model, ids, dtype):
    with autocast(dtype):
        return model(input_ids=ids, labels=ids, use_cache=False).loss


def storages(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def kept_bytes(model, ids, dtype):
    """Of the storages that autograd keeps for the backward pass, without the model's own."""
    own, seen = storages([*model.parameters(), *model.buffers()]), {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, ids, dtype)
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


class Alive(TorchDispatchMode):
    """Counts the bytes of storages made in its block that are alive at once."""

    def __init__(self, known):
        super().__init__()
        self.known, self.sizes, self.now, self.peak = known, {}, 0, 0

    def free(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes and storage.data_ptr() not in self.known:
                    self.sizes[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, key)
        self.peak = max(self.peak, self.now)
        return result


def counted(model, **work):
    return training_memory(model.config.to_dict(), prefix_length=T, lora_rank=RANK, **work)


NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
GRID = [
    # kind, streams, rows, tokens, layers, vocabulary
    ("llama", 1, 2, 16, 3, 50),
    ("llama", 2, 2, 16, 3, 50),
    ("qwen2", 3, 1, 24, 2, 50),
    ("qwen3", 4, 3, 9, 2, 300),
]
RUNS = [(trains, *run) for trains in TRAINS for run in GRID if trains != "streams" or run[1] > 1]


@pytest.mark.parametrize(("trains", "kind", "streams", "rows", "length", "layers", "vocab"), RUNS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", NAMES)
def test_what_is_kept_for_the_backward_pass(dtype, checkpointing, trains, kind, streams, rows, length, layers, vocab):
    """To 16 bytes, of the labels and the loss.

    Of the copies of LoRA's weights those are counted too that are not kept, as the first layer's input needs no
    gradient.
    """
    model = build(kind, streams, layers, vocab, trains, dtype, checkpointing)
    found = kept_bytes(model, batch(model, rows, length), dtype)
    work = {"num_streams": streams, "batch_size": rows, "sequence_length": length, "trains": trains}
    memory = counted(model, **work, dtype=NAMES[dtype], checkpointing=checkpointing).memory
    casts = dtype == torch.bfloat16
    unasked = 2 * 3 * RANK * H if trains == "lora" and casts and not checkpointing else 0
    assert memory["activations"] + memory["copies"] - unasked == pytest.approx(found, rel=0, abs=16)
    assert (memory["copies"] > 0) == (casts and (streams > 1 or trains == "everything" or not checkpointing))


@pytest.mark.parametrize("trains", ["streams", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_kept_of_a_frozen_backbone_in_float32(trains, checkpointing):
    """Autocast copies its matrices too; those of the first layer's queries, keys and values are counted, not kept."""
    model = build("llama", 2, 3, 50, trains, torch.float32, checkpointing)
    found = kept_bytes(model, batch(model, 2, 16), torch.bfloat16)
    work = {"num_streams": 2, "batch_size": 2, "sequence_length": 16, "checkpointing": checkpointing}
    memory = counted(model, **work, trains=trains, frozen_dtype="float32").memory
    matrices = 2 * (H * H + 2 * H * H // 2 + H * H + 3 * H * INNER)
    unasked = 0 if checkpointing else 2 * 3 * RANK * H * (trains == "lora") + 2 * 2 * H * H
    assert memory["copies"] > (0 if checkpointing else 3 * matrices)
    assert memory["activations"] + memory["copies"] - unasked == pytest.approx(found, rel=0, abs=16)


@pytest.mark.parametrize("trains", ["streams", "everything"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("streams", [2, 4])
def test_what_is_kept_where_weights_arrive_in_16_bits(trains, checkpointing, streams):
    """As under FSDP: all weights are bfloat16 when the layers see them, so that nothing is cast."""
    model = build("llama", streams, 3, 50, trains, torch.bfloat16, checkpointing).bfloat16()
    found = kept_bytes(model, batch(model, 2, 16), torch.bfloat16)
    work = {"num_streams": streams, "batch_size": 2, "sequence_length": 16, "checkpointing": checkpointing}
    memory = counted(model, **work, trains=trains, sharding="fsdp", gpus=4).memory
    assert memory["activations"] == pytest.approx(found, rel=0, abs=16)
    assert memory["copies"] == 0


@pytest.mark.grid
@pytest.mark.parametrize(("streams", "length", "layers", "vocab"), [(1, 32, 3, 2000), (4, 32, 3, 50)])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("trains", ["streams", "everything"])
def test_the_peak(trains, dtype, checkpointing, streams, length, layers, vocab):
    """Of bytes alive in the second micro-batch of a step, when gradients and states are there: to 2 %."""
    streams = max(streams, 1 + (trains == "streams"))
    model = build("llama", streams, layers, vocab, trains, dtype, checkpointing)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    ids = batch(model, 2, length)
    loss_of(model, ids, dtype).backward()
    optimizer.step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    gc.collect()
    with Alive(storages([*model.parameters(), *model.buffers(), *gradients])) as alive:
        loss_of(model, ids, dtype).backward()
    work = {"num_streams": streams, "batch_size": 2, "sequence_length": length, "trains": trains}
    memory = counted(model, **work, dtype=NAMES[dtype], checkpointing=checkpointing).memory
    assert memory["activations"] + memory["copies"] + memory["workspace"] == pytest.approx(alive.peak, rel=0.02)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trains", TRAINS)
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_parameters_gradients_and_states_are_counted_exactly(kind, dtype, trains, tied):
    """After a step of AdamW; of its states those of more than one number, the others count steps."""
    model = build(kind, 3, 2, 50, trains, dtype, tied=tied)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    loss_of(model, batch(model, 2, 16), dtype).backward()
    optimizer.step()
    found = counted(model, num_streams=3, batch_size=2, sequence_length=16, trains=trains, dtype=NAMES[dtype])
    states = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    assert found.memory["weights"] == sum(p.nbytes for p in model.parameters())
    assert found.memory["gradients"] == sum(p.grad.nbytes for p in trained)
    assert found.memory["optimizer"] == sum(state.nbytes for state in states)
    assert found.params == sum(p.numel() for p in model.parameters())
    assert found.trained_params == sum(p.numel() for p in trained)


def test_real_backbones_have_their_published_sizes():
    """Parameters with embeddings, as their model cards and safetensors indices say."""
    sizes = {name: read_shape(config) for name, config in known_backbones().items()}
    assert {name: shape.backbone_params + shape.embedding_params for name, shape in sizes.items()} == {
        "Qwen2.5-3B": 3_085_938_688,
        "Llama-3.1-8B": 8_030_261_248,
        "Llama-3.1-70B": 70_553_706_496,
    }


LLAMA = known_backbones()["Llama-3.1-8B"]
WORK = {"num_streams": 4, "batch_size": 1, "sequence_length": 2048}


def test_all_of_an_8b_model_takes_16_bytes_a_parameter():
    found = training_memory(LLAMA, **WORK, trains="everything")
    held = sum(found.memory[name] for name in ("weights", "gradients", "optimizer"))
    assert held == 16 * found.params
    assert (
        found.trained_params
        == found.params
        == 8_030_261_248 + read_shape(LLAMA).prefix_params(4) + 4 * 4096**2 + (4096 + 4 * 4096 + 4)
    )
    assert sum(found.memory.values()) == found.memory_bytes
    assert not found.fits
    assert training_memory(LLAMA, **WORK, checkpointing=True).fits


@pytest.mark.parametrize("spare", [0.97, 1.0])
def test_what_fits_is_counted_in_powers_of_ten(spare):
    used = training_memory(LLAMA, **WORK).memory_bytes
    device = dataclasses.replace(known_hardware()["a100-80gb"], memory_gb=spare * used / 1e9)
    assert training_memory(LLAMA, **WORK, hardware=device).fits is (spare == 1.0)


def test_fsdp_divides_what_lies_and_not_what_runs():
    one, eight = (training_memory(LLAMA, **WORK, trains="everything", sharding="fsdp", gpus=g).memory for g in (1, 8))
    for name in ("weights", "gradients", "optimizer"):
        assert eight[name] == one[name] / 8
    for name in ("activations", "workspace", "gathered"):
        assert eight[name] == one[name]


def test_what_fsdp_gathers():
    """By hand: embedding, head and final norm; two layers; gradients of what trains in the root and in one layer."""
    layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    prefixes = 2 * 4 * 8 * 48 * 128
    root, aggregator = 2 * 128256 * 4096 + 4096, 4 * 4096**2 + 4096 + 4 * 4096 + 4
    streams = training_memory(LLAMA, **WORK, sharding="fsdp", gpus=8).memory
    assert streams["gathered"] == 2 * (root + 2 * layer + 2 * (aggregator + prefixes) + prefixes)
    everything = training_memory(LLAMA, **WORK, sharding="fsdp", gpus=8, trains="everything").memory
    assert everything["gathered"] == 2 * (2 * (root + aggregator) + 3 * (layer + prefixes))


def test_copies_of_the_model_exchange_gradients_in_buckets():
    alone, many = (training_memory(LLAMA, **WORK, gpus=gpus) for gpus in (1, 64))
    assert many.memory_bytes - alone.memory_bytes == many.memory["gathered"] == many.memory["gradients"]


def test_quantised_weights_shrink_and_activations_do_not():
    sixteen, eight, four = (training_memory(LLAMA, **WORK, frozen_dtype=x).memory for x in ("bfloat16", "int8", "int4"))
    matrices = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert sixteen["weights"] - eight["weights"] == matrices
    assert sixteen["weights"] - four["weights"] == matrices * (16 - 4.5) / 8
    assert sixteen["activations"] == four["activations"]


def test_log_probabilities_are_not_kept_for_each_stream():
    def at(vocab, streams):
        return training_memory(LLAMA | {"vocab_size": vocab}, **WORK | {"num_streams": streams}).memory["activations"]

    assert at(2000, 2) - at(1000, 2) == at(2000, 8) - at(1000, 8) == 4 * 2048 * 1000


@pytest.mark.parametrize(
    "change",
    [{"num_streams": 8}, {"batch_size": 2}, {"sequence_length": 4096}, {"prefix_length": 96}, {"lora_rank": 32}],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_more_of_anything_takes_more(change, checkpointing):
    work = WORK | {"trains": "lora", "checkpointing": checkpointing}
    assert training_memory(LLAMA, **work | change).memory_bytes > training_memory(LLAMA, **work).memory_bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_streams": 0}, "num_streams is 0; it must be a whole number of at least 1"),
        ({"gpus": 1.5}, "gpus is 1.5"),
        ({"prefix_length": 0}, "prefix_length is 0"),
        ({"trains": "heads"}, "no trains 'heads'; give one of streams, everything, lora"),
        ({"sharding": "zero"}, "no sharding 'zero'; give one of none, fsdp"),
        ({"dtype": "float16"}, "no dtype 'float16'; give one of bfloat16, float32"),
        ({"frozen_dtype": "int2"}, "no frozen_dtype 'int2'; give one of float32, bfloat16"),
        ({"dtype": "float32", "frozen_dtype": "int8"}, "frozen_dtype is 'int8' and dtype 'float32'"),
        ({"num_streams": 1}, "there are no streams to train"),
        ({"hardware": "abacus"}, "no hardware 'abacus'"),
    ],
)
def test_impossible_runs_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        training_memory(LLAMA, **WORK | change)


MIXTURE = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize("change", [{"model_type": "gpt_neox"}, MIXTURE])
def test_models_of_another_kind_are_refused(change):
    with pytest.raises(ValueError, match="decoders with a gated MLP in every layer"):
        training_memory(LLAMA | change, **WORK)
