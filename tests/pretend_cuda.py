"""A CUDA device for machines without one: tensors that say "cuda:0" and are computed on the CPU.

It finds what a CPU run cannot: tensors of two devices in one operation, numpy reading device memory, and every
operation at which the host would wait for the device. It says nothing about speed or about the numbers of a real one::

    with pretend_cuda() as device:
        x = torch.ones(3).to("cuda:0")
        x + torch.ones(3)      # RuntimeError, as on a real device
        x.sum().item()         # device.waits["_local_scalar_dense"] == 1
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CUDA = torch.device("cuda:0")

# Operations whose result's size or value the host must know before it can go on.
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
READS = {Tensor.__int__, Tensor.__float__, Tensor.__bool__, Tensor.__index__, Tensor.item, Tensor.tolist}
# Operations that take tensors of both devices: copies, and indices of either device into a tensor on this one.
MIXES = {aten.copy_.default, aten._to_copy.default}
TAKES_CPU_INDICES = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class OnDevice(Tensor):
    """A tensor whose numbers lie in `on_cpu` and which says that it is on CUDA."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls,
            on_cpu.size(),
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=CUDA,
        )

    def __init__(self, on_cpu: Tensor) -> None:
        self.on_cpu = on_cpu

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.on_cpu})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            with torch._C.DisableTorchFunctionSubclass():  # what comes back on the CPU is an ordinary tensor
                return func(*args, **(kwargs or {}))
        except RuntimeError as error:
            if "not linked with support for cuda" not in str(error) and func is not Tensor.tolist:
                raise
        # Indexing, conversions and some other methods ask for a driver before any mode sees them.
        assert PretendCuda.active is not None
        return PretendCuda.active.by_hand(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a pretended device outside of pretend_cuda()")


def _inside(x: Any) -> Any:
    return x.on_cpu if isinstance(x, OnDevice) else x


class PretendCuda(TorchDispatchMode):
    """Computes on the CPU, keeps the books for CUDA.

    Attributes:
        waits: how often the host waited for the device, by operation.
        operations: how many operations ran on the device.
    """

    active: PretendCuda | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (aten._pin_memory.default, aten.is_pinned.default):
            return args[0] if func is aten._pin_memory.default else False
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = any(isinstance(x, OnDevice) for x in given)
        asked = kwargs.get("device")
        asked = None if asked is None else torch.device(asked)
        if not here and (asked is None or asked.type != "cuda"):
            return func(*args, **kwargs)
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        stays = asked is None or asked.type == "cuda"
        if here:
            self.operations += 1
            self._check(func, args, given)
            to_host = func is aten.copy_.default and not isinstance(args[0], OnDevice)
            masks = func in TAKES_CPU_INDICES and any(
                x.dtype == torch.bool for x in tree_leaves(args[1]) if x is not None
            )
            if func in WAITS or not stays or to_host or masks:
                self.waits[func.overloadpacket.__name__] += 1
        result = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
        return self._outside(func, result, args, stays)

    def by_hand(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A method of a tensor, bookkeeping included."""
        self.operations += 1
        whole = args[0]
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            if not isinstance(whole, OnDevice):
                raise RuntimeError("indices should be on the same device as the indexed tensor, which is on the CPU")
            # A mask, or one number, as index must be read; what is written may come from the host.
            index = [x for x in tree_leaves(args[1]) if isinstance(x, OnDevice)]
            if any(x.dim() == 0 or x.dtype == torch.bool for x in index):
                self.waits["index"] += 1
        else:
            self._check(func, args, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)])
            if func in READS or func is Tensor.nonzero:
                self.waits[func.__name__] += 1
        result = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))
        if result is whole.on_cpu:
            return whole
        return tree_map(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, result)

    def _check(self, func: Any, args: Any, given: list[Tensor]) -> None:
        if func in MIXES:
            return
        if func in TAKES_CPU_INDICES and isinstance(args[0], OnDevice):
            given = [args[0]] if func is aten.index.Tensor else [args[0], args[2]]
        elsewhere = [x for x in given if not isinstance(x, OnDevice) and x.dim() > 0]
        if elsewhere:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but one is on the CPU")

    def _outside(self, func: Any, result: Any, args: Any, stays: bool) -> Any:
        if not stays:
            return result
        written = {id(_inside(x)): x for x in args if isinstance(x, OnDevice)}  # in-place operations return their input

        def wrap(x: Any) -> Any:
            if not isinstance(x, Tensor) or func is aten.copy_.default and not isinstance(args[0], OnDevice):
                return x
            return written[id(x)] if id(x) in written else OnDevice(x)

        return tree_map(wrap, result)


class _Named(TorchFunctionMode):
    """Names the device in full, since asking which one is meant asks a driver; data from Python lands on the CPU first,
    since C++ would take it to the device before any mode sees it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def named(x: Any) -> Any:
            if isinstance(x, torch.device) and x.type == "cuda":
                return CUDA
            return "cuda:0" if isinstance(x, str) and x == "cuda" else x

        args = tuple(x if isinstance(x, Tensor) else named(x) for x in args)
        kwargs = {name: x if isinstance(x, Tensor) else named(x) for name, x in (kwargs or {}).items()}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") in (CUDA, "cuda:0"):
            kwargs.pop("device")
            return func(*args, **kwargs).to(CUDA)
        return func(*args, **kwargs)


@contextmanager
def pretend_cuda(free_bytes: int = 2**33) -> Iterator[PretendCuda]:
    """Inside, there is a CUDA device with so much free memory."""
    device = PretendCuda()
    patches = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (free_bytes, free_bytes),
        "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "is_bf16_supported": lambda *_: True,
        "get_device_name": lambda *_: "pretended",
    }
    with (
        mock.patch.multiple(torch.cuda, **patches),
        # Moved parameters are new objects, not old ones with other data.
        mock.patch.object(torch.__future__, "_overwrite_module_params_on_conversion", True),
        mock.patch.object(PretendCuda, "active", device),
        device,
        _Named(),
    ):
        yield device
