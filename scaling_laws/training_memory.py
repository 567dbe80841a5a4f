"""The memory of each GPU in training, counted for planning a run.

Counted for decoders with a gated MLP and RMSNorm (Llama, Mistral, Qwen2, Qwen3, Granite, Gemma), without norms that
other families add, trained on sequences without padding by fused AdamW, with 32-bit states and 32-bit master weights of
the trained parameters. Attention is `sdpa`: flash attention, whose backward pass needs queries, keys, values, output
and log-sum-exp but no scores (Dao et al., arXiv 2205.14135); `eager` stores the scores too. n = P*B*S tokens go through
the layers, b = B*S through the head. Stored for the backward pass, in bytes, with c bytes for a computed number (for
such counts see Korthikanti et al., arXiv 2205.05198):

    a layer's norms       8*n*(H + 1), and more for gradients of their weights and the inputs of trained matrices
    its attention         c*n*(2*heads*D + 2*G*D) + 4*n*heads
    Qwen3's norms there   4*n*(heads + G)*(D + 1), and c*n*(heads + G)*D for gradients of their weights
    its MLP               c*n*3*I, and c*n*I for the last matrix's input
    final norm            4*(n*H + n)
    aggregator, P > 1     c*n*H + 2*c*b*H + (4 + c)*b*P; 2*c*n*H under autocast, which casts for two products
    head                  4*b*V, the log-probabilities; never P times

The inputs of matrices are stored only if these are trained; a frozen backbone passes gradients without them, and in its
first layer nothing before the attention needs gradients. With checkpointing each layer stores only its input, c*n*H or
4*n*H, and one layer at a time is recomputed. Not counted: the device's context, communication buffers of NCCL,
fragmentation of the allocator, and the data loader. Tests compare the count with the tensors that transformers' Llama,
Qwen2 and Qwen3 store (equal) and with the peak of allocated bytes (within 2 %), on a CPU; on a GPU the fused aggregator
stores less.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from parscale.scaling_laws.arguments import require_count, require_known
from parscale.scaling_laws.configs import Config, read_shape
from parscale.scaling_laws.costs import DTYPES
from parscale.scaling_laws.data import data_rows
from parscale.scaling_laws.hardware import Hardware, find_hardware
from parscale.scaling_laws.shapes import ModelShape

TRAINS = ("streams", "everything", "lora")
SHARDINGS = ("none", "fsdp")
QUERY_KEY_NORMS = ("qwen3",)  # model types that normalize the queries and keys of each head
MASTER = 4  # bytes of a trained number, of its gradient, and of each of AdamW's two states
CACHED_LAYERS = 2  # for FSDP: the layer that runs and the next one, which is being gathered


@dataclass(frozen=True)
class TrainingMemory:
    """The peak memory of training on each GPU, in bytes."""

    memory_bytes: float
    """Bytes on one GPU."""
    memory: dict[str, float]
    """`memory_bytes`, split by content:

    - `weights`: in 32 bits if they are trained.
    - `gradients`, `optimizer`: of trained parameters.
    - `copies`: 16-bit copies of trained and 32-bit weights, made by autocast.
    - `gathered`: the layers that FSDP has gathered, with their gradients; for a replicated model on several GPUs (DDP),
      the buckets for exchanging gradients.
    - `activations`: stored for the backward pass.
    - `workspace`: other memory at the peak: the gradient of the logits, or the gradients of one layer and, with
      checkpointing, its activations.
    """
    params: float
    """The number of all parameters, including embedding, streams and adapters."""
    trained_params: float
    """The number of trained parameters."""
    fits: bool
    """Whether it fits into the memory of the device, without any reserve."""
    hardware: str
    """The name of the device."""


@dataclass(frozen=True)
class _Run:
    """The settings of the count. Bytes: c of a computed number, r of the residual stream, stored of a frozen weight."""

    shape: ModelShape
    P: int
    B: int
    S: int
    trains: str
    rank: int
    c: int
    r: int
    stored: float
    casts: bool
    checkpointing: bool

    @property
    def n(self) -> int:
        return self.P * self.B * self.S

    @property
    def b(self) -> int:
        return self.B * self.S

    @property
    def everything(self) -> bool:
        return self.trains == "everything"

    @property
    def lora(self) -> bool:
        return self.trains == "lora"


def training_memory(
    config: Config,
    *,
    num_streams: int,
    batch_size: int,
    sequence_length: int,
    prefix_length: int | None = None,
    gpus: int = 1,
    sharding: str = "none",
    trains: str = "streams",
    lora_rank: int = 16,
    dtype: str = "bfloat16",
    frozen_dtype: str | None = None,
    checkpointing: bool = False,
    hardware: str | Hardware = "a100-80gb",
) -> TrainingMemory:
    """The bytes of training on each GPU, at the peak of a step's second micro-batch.

    Args:
        config: a `config.json`'s path, its folder's, its contents, or a `ModelShape`; a decoder with a gated MLP.
        num_streams: P.
        batch_size: sequences on each GPU at once, before they are copied to the streams.
        sequence_length: tokens in each.
        prefix_length: T; by default the configuration's own, or 48.
        gpus: number of GPUs.
        sharding: `"none"` (every GPU holds everything) or `"fsdp"` (parameters, gradients and states are sharded over
            the GPUs, and one decoder layer at a time is gathered).
        trains: `"streams"`, `"everything"`, or `"lora"`: streams and adapters on all of the layers' matrices.
        lora_rank: of these adapters.
        dtype: `"bfloat16"` computes under autocast, `"float32"` without.
        frozen_dtype: dtype of frozen weights, as in `cost`, by default `dtype`; 8 and 4 bits apply to the matrices of
            the layers, and the rest has 16.
        checkpointing: of activations, by layer.
        hardware: for `fits`.

    Returns:
        The bytes, split by what they hold.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: a number is out of range, a name is unknown, the model is not supported, or P = 1 where only streams
            are trained.
    """
    counts = {"num_streams": num_streams, "batch_size": batch_size, "sequence_length": sequence_length, "gpus": gpus}
    counts |= {"lora_rank": lora_rank} | ({} if prefix_length is None else {"prefix_length": prefix_length})
    for name, value in counts.items():
        require_count(name, value)
    frozen = dtype if frozen_dtype is None else frozen_dtype
    require_known("trains", trains, TRAINS)
    require_known("sharding", sharding, SHARDINGS)
    require_known("dtype", dtype, ("bfloat16", "float32"))
    require_known("frozen_dtype", frozen, DTYPES)
    if num_streams == 1 and trains == "streams":
        raise ValueError("with num_streams 1 there are no streams to train; give trains='everything' or 'lora'")
    if dtype == "float32" and trains != "everything" and frozen != "float32":
        raise ValueError(f"frozen_dtype is {frozen!r} and dtype 'float32'; give dtype='bfloat16', or frozen float32")
    device = find_hardware(hardware)
    shape = _countable_shape(config, prefix_length)
    c = 2 if dtype == "bfloat16" else 4
    whole = trains == "everything" or frozen == "float32"
    run = _Run(
        shape=shape,
        P=num_streams,
        B=batch_size,
        S=sequence_length,
        trains=trains,
        rank=lora_rank if trains == "lora" else 0,
        c=c,
        r=c if sharding == "fsdp" else 4 if whole else 2,
        stored=4 if whole else DTYPES[frozen][1] / 8,
        casts=c == 2 and sharding == "none",
        checkpointing=checkpointing,
    )
    backbone = shape.backbone_params + shape.embedding_params
    added = shape.prefix_params(run.P) + shape.aggregator_params(run.P) + _lora_params(run)
    trained = added + (backbone if run.everything else 0)
    memory = _memory(run, trained, gpus, sharding)
    total = sum(memory.values())
    return TrainingMemory(total, memory, backbone + added, trained, total <= device.memory_gb * 1e9, device.name)


def _countable_shape(config: Config, prefix_length: int | None) -> ModelShape:
    """The shape of a model whose training is counted, with another prefix length if given."""
    shape = read_shape(config)
    if shape.experts or not shape.gated or not shape.has_equal_layers:
        raise ValueError(
            "training is counted for decoders with a gated MLP in every layer and the same grouped-query attention in "
            f"each, but {shape.name!r} is not one"
        )
    return shape if prefix_length is None else dataclasses.replace(shape, prefix_length=prefix_length)


def _memory(run: _Run, trained: float, gpus: int, sharding: str) -> dict[str, float]:
    """The bytes on each GPU, split as in `TrainingMemory.memory`; `trained` parameters."""
    shards = gpus if sharding == "fsdp" else 1
    kept, copies, workspace = _activations(run)
    return {
        "weights": (_stored_bytes(run) + MASTER * trained) / shards,
        "gradients": MASTER * trained / shards,
        "optimizer": 2 * MASTER * trained / shards,
        "copies": copies,
        "gathered": _gathered(run) if sharding == "fsdp" else MASTER * trained if gpus > 1 else 0.0,
        "activations": kept,
        "workspace": workspace,
    }


def known_backbones() -> dict[str, dict[str, Any]]:
    """The shapes of released models by name (`data/backbones.csv`), as the contents of a `config.json`."""
    backbones: dict[str, dict[str, Any]] = {}
    for row in data_rows("backbones.csv"):
        name, kind, tied = (row.pop(key) for key in ("name", "model_type", "tie_word_embeddings"))
        sizes = {key: int(value) for key, value in row.items()}
        backbones[name] = {"model_type": kind, "tie_word_embeddings": tied == "true", **sizes}
    return backbones


def _matrices(shape: ModelShape) -> list[tuple[float, float]]:
    """The input and output sizes of one layer's seven matrices."""
    layer = shape.attention[0]
    h, query, kv = shape.hidden, layer.query, layer.kv_per_token / 2
    return [(h, query), (h, kv), (h, kv), (query, h)] + [(h, shape.intermediate)] * 2 + [(shape.intermediate, h)]


def _matrix_params(shape: ModelShape) -> float:
    return sum(inputs * outputs for inputs, outputs in _matrices(shape))


def _lora_params(run: _Run) -> float:
    return run.shape.layers * run.rank * sum(inputs + outputs for inputs, outputs in _matrices(run.shape))


def _stored_bytes(run: _Run) -> float:
    """The stored bytes of the frozen backbone."""
    if run.everything:
        return 0.0
    shape = run.shape
    matrices = shape.layers * _matrix_params(shape)
    rest = shape.backbone_params + shape.embedding_params - matrices
    return matrices * run.stored + rest * max(run.stored, 2)


def _gathered(run: _Run) -> float:
    """With FSDP: the root (embedding, head, aggregator), two layers, and the gradients of the root and one layer."""
    shape = run.shape
    trained_layer = shape.prefix_params(run.P) / shape.layers + _lora_params(run) / shape.layers
    layer = (shape.backbone_params - shape.hidden) / shape.layers
    root = shape.embedding_params + shape.hidden
    trained_root = shape.aggregator_params(run.P)
    if run.everything:
        trained_layer, trained_root, frozen_layer, frozen_root = trained_layer + layer, trained_root + root, 0.0, 0.0
    else:
        matrices = _matrix_params(shape)
        frozen_layer = matrices * run.stored + (layer - matrices) * max(run.stored, 2)
        frozen_root = root * max(run.stored, 2)
    weights = run.c * trained_root + frozen_root + CACHED_LAYERS * (run.c * trained_layer + frozen_layer)
    return weights + run.c * (trained_root + trained_layer)


def _activations(run: _Run) -> tuple[float, float, float]:
    """Bytes stored for the backward pass, bytes of copied weights, and bytes of other memory at the peak."""
    shape, n, b = run.shape, run.n, run.b
    layer, first = _layer(run)
    final_norm, mixing, head_copies = _head(run)
    layer_copies = _layer_copies(run)
    logits, residual, inner = 4 * b * shape.vocab, run.r * n * shape.hidden, run.c * n * shape.intermediate
    ids = 8 * b + (8 * n if run.everything else 0)
    kept, copies, again = final_norm + mixing + ids, head_copies, 0.0
    if run.checkpointing:
        kept += shape.layers * residual
        again = layer + layer_copies - (residual if run.r == 4 else 0)  # its input is already stored
    else:
        rotary = 2 * run.S * shape.attention[0].head_dim * run.r  # sines and cosines
        kept += first + (shape.layers - 1) * layer + rotary
        copies += shape.layers * layer_copies
    moments: list[float] = [2 * logits]  # the loss: gradients of log-probabilities and of logits
    freed = mixing + head_copies
    moments.append((16 if run.r == 4 else 20) * n * shape.hidden - freed)  # final norm: gradients and products, fp32
    gradients = 3 * inner + residual - (0 if run.trains == "streams" else inner)
    moments.append(again + gradients - freed - final_norm)  # the last layer's MLP
    if run.checkpointing and run.everything:  # the end of the forward pass, when autocast frees its copies
        moments.append(shape.layers * layer_copies + (run.c * b * shape.vocab + logits if run.casts else 0))
    return kept, copies, max(moments)


def _layer(run: _Run) -> tuple[float, float]:
    """The bytes that a layer stores, and those of the first layer."""
    shape, n, c = run.shape, run.n, run.c
    h, inner, heads = shape.hidden, shape.intermediate, shape.attention[0]
    query, kv = heads.query, heads.kv_per_token / 2
    norm: float = 4 * n * (h + 1)
    attention = c * n * (2 * query + 2 * kv) + 4 * n * heads.heads
    mlp = 3 * c * n * inner
    into_attention, into_mlp, others = 0.0, 0.0, 0.0
    if run.everything:
        norm += run.r * n * h
        apart = run.r != c  # each matrix then has its own copy
        into_attention, into_mlp = c * n * h * (3 if apart else 1), c * n * h * (2 if apart else 1)
        others = c * n * inner
    elif run.lora:
        into_attention, into_mlp = c * n * h * (3 if run.casts else 1), c * n * h * (2 if run.casts else 1)
        others = c * n * (inner + 7 * run.rank + (query if run.casts else 0))
    heads_norms = 0.0
    if shape.name in QUERY_KEY_NORMS:
        heads_norms = n * (heads.heads + heads.kv_heads) * (4 * heads.head_dim + 4)
        heads_norms += c * n * (query + kv) if run.everything else 0
    layer = 2 * norm + attention + heads_norms + mlp + into_attention + into_mlp + others
    without_gradient = {"streams": norm + heads_norms, "lora": norm, "everything": 0.0}[run.trains]
    return layer, layer - without_gradient


def _layer_copies(run: _Run) -> float:
    """The bytes of a layer's weights in 16 bits, if autocast copies them from 32."""
    if not run.casts:
        return 0.0
    shape = run.shape
    matrices = _matrix_params(shape) if run.everything or run.stored == 4 else 0.0
    return 2 * (matrices + (shape.prefix_params(run.P) + _lora_params(run)) / shape.layers)


def _head(run: _Run) -> tuple[float, float, float]:
    """The bytes stored by the final norm, by aggregator and head, and those of copies of their weights."""
    shape, n, b, c, P = run.shape, run.n, run.b, run.c, run.P
    h = shape.hidden
    final_norm = 4 * n * (h + 1) + (run.r * n * h if run.everything else 0)
    kept = 4 * b * shape.vocab + (c * b * h if run.everything else 0)
    copies = 2 * shape.vocab * h if run.everything or run.stored == 4 else 0
    if P > 1:
        kept += (1 if c == 4 else 2) * c * n * h + 2 * c * b * h + (4 + c) * b * P
        copies += 2 * (P * h * h + h * P)
    return final_norm, kept, copies if run.casts else 0
