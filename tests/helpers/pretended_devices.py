"""Devices that the machine does not have: tensors that say they are on one, compute on the CPU, and refuse to be mixed.

After `register()` a process has the devices `pretend:0` and `pretend:1`. An operation on tensors of different devices
raises `RuntimeError`, as on GPUs; as there, a single number of the CPU and indices on the CPU may be mixed in. Only a
process of its own should register them, since torch takes them for its accelerator from then on. torch's autograd
engine knows `pretend:0` alone.
"""

from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_iter, tree_map_only

NAME = "pretend"
AVAILABLE = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")  # since torch 2.10
_aten = torch.ops.aten
_INDEXING = (
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor,
)
_MOVING = (_aten.copy_.default, _aten._to_copy.default)


class Pretended(torch.Tensor):
    """A tensor with its values on the CPU and another device's name.

    Args:
        values: on the CPU.
        device: which it says it is on.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor, device: torch.device) -> "Pretended":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=device,
            requires_grad=values.requires_grad,
        )

    def __init__(self, values: torch.Tensor, device: torch.device) -> None:
        self.values_here = values

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = torch.device(kwargs.get("device") or _device_of(operation, args, kwargs))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        known = {id(x.values_here): x for x in tree_iter((args, kwargs)) if isinstance(x, cls)}
        args, kwargs = tree_map_only(cls, lambda x: x.values_here, (args, kwargs))
        if operation is _aten.histc.default:  # on integers, which only GPUs count
            found = operation(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
        else:
            found = operation(*args, **kwargs)
        if device.type == "cpu":
            return found
        return tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else cls(x, device), found)


def _device_of(operation: Any, args: Any, kwargs: Any) -> torch.device:
    """The device on which an operation runs.

    Raises:
        RuntimeError: its tensors are on several.
    """
    if operation in _MOVING:
        return args[0].device
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
    if operation in _INDEXING:
        indices = {id(x) for x in args[1]}
        tensors = [x for x in tensors if id(x) not in indices or not x.is_cpu]
    devices = {x.device for x in tensors if x.ndim or not x.is_cpu}
    if len(devices) > 1:
        shapes = [(str(x.device), tuple(x.shape)) for x in tensors]
        raise RuntimeError(f"{operation} on tensors of several devices: {shapes}")
    return devices.pop() if devices else torch.device("cpu")


class _Module(backend_registration._DummyBackendModule if AVAILABLE else object):  # type: ignore[misc]
    """What torch asks of `torch.pretend`."""

    def device_count(self) -> int:
        return 2

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()  # random numbers are the CPU's

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)


def register() -> list[torch.library.Library]:
    """Makes the devices known to this process, for as long as what it returns exists."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    return [library]


def _empty(
    size: Any,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> Pretended:
    form = memory_format or torch.contiguous_format
    return Pretended(torch.empty(size, dtype=dtype, memory_format=form), device)


def _empty_strided(
    size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Pretended:
    return Pretended(torch.empty_strided(size, stride, dtype=dtype), device)


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    source, into = (x.values_here if isinstance(x, Pretended) else x for x in (source, target))
    into.copy_(source)
    return target
