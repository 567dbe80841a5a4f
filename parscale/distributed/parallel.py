"""Streams of a model whose weights are on several devices.

Data parallelism needs nothing here: FSDP2 shards a model after wrapping. DDP synchronizes the gradients of what trains
when it is made, so the set of streams is chosen before. A model does not know of the DDP around it, so nothing here can
check that.

**Tensor parallelism**: transformers has replaced the backbone's matrices by `DTensor` parameters on a one-dimensional
mesh, and each device attends with its own G / size key/value heads, or with all heads if the plan gathers them. The
parameters of the streams are `DTensor`s too: a prefix is one `(P, G, T, D)`, sharded along G as the layer's keys are,
and the aggregator is replicated. So gradients, their norm, the optimizer's state and `full_tensor()` equal those on one
device, and all trainable parameters have the same type, which `clip_grad_norm_` and fused optimizers require.

**DeepSpeed ZeRO-3** partitions the backbone's parameters when it is loaded, and gathers them itself only once its
engine runs. Wrapping runs the backbone before that.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from parscale.compat.deepspeed import gathered, is_of_engine, is_partitioned

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

if dist.is_available():
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    DISTRIBUTED: tuple[Any, ...] = (DTensor,)
else:
    DISTRIBUTED = ()  # asked for at each layer of each token

HEADS = 1  # the dimension of G in a prefix (P, G, T, D) and in keys (R, G, K, D)


def local(tensor: Any) -> torch.Tensor:
    """This device's part of a parameter; the parameter itself where nothing is distributed."""
    return tensor.to_local() if isinstance(tensor, DISTRIBUTED) else tensor


def whole(tensor: Any) -> torch.Tensor:
    """The full parameter, on every device. If it is distributed, every process has to call this."""
    if is_partitioned(tensor):
        with gathered([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if isinstance(tensor, DISTRIBUTED) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether no process holds all of the model's parameters."""
    return any(is_partitioned(p) or isinstance(p, DISTRIBUTED) for p in model.parameters())


def is_main_process() -> bool:
    """Whether this process writes files, as in transformers' own `save_pretrained`."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


def gathered_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The `state_dict` with full tensors, on the CPU, in the writing process; an empty one in all others.

    Every process has to call this. Only one tensor at a time is gathered on the devices.
    """
    first_names: dict[int, str] = {}  # tied weights are stored once
    state_dict: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = first_names.setdefault(id(tensor), name)
        value = whole(tensor).detach() if first == name else None
        if is_main_process():
            state_dict[name] = state_dict[first] if value is None else value.cpu()
    return state_dict


@contextlib.contextmanager
def together_at_the_end() -> Iterator[None]:
    """No process leaves this block before the last one has reached its end; if one fails, all do.

    Raises:
        RuntimeError: in the other processes, with the error of the one that failed.
    """
    try:
        yield
    except BaseException as error:
        of_all_processes(f"{type(error).__name__}: {error}")
        raise
    for rank, failure in enumerate(of_all_processes("")):
        if failure:
            raise RuntimeError(f"Process {rank} failed: {failure}")


def of_all_processes(text: str) -> list[str]:
    """The texts of all processes, by their ranks. Every process has to call this."""
    texts = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return texts


def check_takes_parameters(model: nn.Module) -> None:
    """Raises an error if the model is sharded for training: new parameters would be neither sharded nor synchronized.

    Raises:
        ValueError: FSDP, or DeepSpeed's engine, has sharded the model.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing is sharded by it
    sharded_by = None
    if fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules()):
        sharded_by = "FSDP"
    elif is_of_engine(model):
        sharded_by = "DeepSpeed"
    if sharded_by is not None:
        raise ValueError(
            f"This {type(model).__name__} is sharded by {sharded_by} already, which would not see the streams' "
            "parameters: wrap the model (and add further sets) first, then let the Trainer or accelerate shard it."
        )


def reshard(model: nn.Module) -> None:
    """Shards each parameter again that FSDP holds gathered, for example after an evaluation.

    Freezing then applies to the sharded parameter, and from the next forward pass to the gathered one as well. A
    gathered parameter that was frozen for an evaluation would get no gradient in the next training step.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


# -- tensor parallelism


def tensor_parallel_mesh(model: Any) -> Any:
    """The `DeviceMesh` over which the model's layers are split; `None` if they are not."""
    meshes = (p.device_mesh for p in model.parameters() if isinstance(p, DISTRIBUTED))
    return next((mesh for mesh in meshes if mesh.ndim == 1), None)


def gather_heads(states: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """Gathers the heads of all devices, `(R, G, K, D)`, from `(R, G / size, K, D)` on each."""
    return DTensor.from_local(states, mesh, [Shard(HEADS)], run_check=False).full_tensor()


def share_random_state(mesh: DeviceMesh) -> None:
    """Gives every process of the mesh the random state of its first one, so that all draw the same numbers."""
    group = mesh.get_group()
    generators: list[Any] = [torch]
    if mesh.device_type != "cpu":
        generators.append(torch.get_device_module(mesh.device_type))
    for generator in generators:
        state = generator.get_rng_state().to(mesh.device_type)
        dist.broadcast(state, dist.get_global_rank(group, 0), group=group)
        generator.set_rng_state(state.cpu())


def distribute_parameter(module: nn.Module, name: str, mesh: DeviceMesh, *, by_heads: bool = False) -> None:
    """Turns a module's parameter, which every process holds, into a parameter of a tensor-parallel model, in place.

    All processes get the values of the first process in the mesh.

    Args:
        module: the module that holds the parameter.
        name: the parameter's name in it.
        mesh: of the model.
        by_heads: each process keeps its own key/value heads; otherwise all heads.
    """
    parameter = getattr(module, name)
    shared = distribute_tensor(parameter.detach(), mesh, [Shard(HEADS) if by_heads else Replicate()])
    setattr(module, name, nn.Parameter(shared, requires_grad=parameter.requires_grad))


# -- DeepSpeed ZeRO-3


@contextlib.contextmanager
def each_module_gathered(model: nn.Module) -> Iterator[None]:
    """In this block ZeRO-3's parameters are gathered while a module that holds them runs, and partitioned otherwise."""
    inside: dict[nn.Module, Any] = {}

    def bring(module: nn.Module, args: object) -> None:
        inside[module] = gathered(list(module.parameters(recurse=False)))
        inside[module].__enter__()

    def let_go(module: nn.Module, args: object, output: object) -> None:
        inside.pop(module).__exit__(None, None, None)

    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            if any(is_partitioned(parameter) for parameter in module.parameters(recurse=False)):
                hooks.enter_context(module.register_forward_pre_hook(bring))
                hooks.enter_context(module.register_forward_hook(let_go, always_call=True))
        yield
