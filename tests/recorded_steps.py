"""What a step asks of torch and of kernels: nothing that needs the host, and the same at every length."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import emulated
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention_predictor.csrc.kernel import Kernel
from attention_predictor.offload.hf.graph import EAGER_STEPS, CacheGraph

# Operations whose result, or the shape of it, the host must know.
ASKING = {
    "aten._local_scalar_dense",
    "aten._unique2",
    "aten.bincount",
    "aten.equal",
    "aten.is_nonzero",
    "aten.item",
    "aten.masked_select",
    "aten.nonzero",
    "aten.nonzero_numpy",
    "aten.unique_dim",
    # Of experts: on a GPU they read the offsets of groups back, but for bf16.
    "aten._grouped_mm",
    "transformers.grouped_mm_fallback",
}


class Recorder(TorchDispatchMode):
    """Notes each operation with shapes, dtypes and all that is no tensor.

    Attributes:
        calls: One line an operation, in order.
        may_ask: Whether operations may ask the host; else one that does is an error.
    """

    def __init__(self, may_ask: bool) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.may_ask = may_ask

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = str(func.overloadpacket)
        kwargs = kwargs or {}
        if not self.may_ask and _asks(name, args, kwargs):
            raise AssertionError(f"{name}({_told(args)}) asks the host in a step that is to be captured")
        self.calls.append(f"{func}({_told(args)}, {_told(kwargs)})")
        return func(*args, **kwargs)

    def note_launch(self, kernel: Kernel, grid: tuple[int, int, int], arguments: ctypes.Structure) -> None:
        """A kernel with its grid and all arguments but addresses, of which it only matters whether there is one."""
        self.calls.append(f"{kernel.name}{grid}({_fields(arguments)})")


def _asks(name: str, args: tuple, kwargs: dict) -> bool:
    if name.startswith("aten.index"):
        lists = (value for value in args if isinstance(value, (list, tuple)))
        return any(isinstance(x, Tensor) and x.dtype == torch.bool for indices in lists for x in indices)
    return name in ASKING or (name == "aten.repeat_interleave" and kwargs.get("output_size") is None)


def _told(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_told, value))}]"
    if isinstance(value, dict):
        return ", ".join(f"{name}={_told(given)}" for name, given in value.items())
    return repr(value)


def _fields(struct: ctypes.Structure) -> str:
    told = []
    for name, kind, *_ in struct._fields_:
        value = getattr(struct, name)
        if isinstance(value, ctypes.Structure):
            value = _fields(value)
        elif issubclass(kind, ctypes.c_void_p):
            value = bool(value)
        told.append(f"{name}={value}")
    return ", ".join(told)


@contextmanager
def recorded_steps() -> Iterator[list[list[str]]]:
    """What the steps within it consist of, one list a step, where they run kernel by kernel on an emulated GPU.

    The first ones, which come before a capture, may ask the host: things are made once, in the step that needs them.
    """
    steps: list[list[str]] = []
    step, launch = CacheGraph._step, emulated.launch

    def recorded(self: CacheGraph, *args: Any) -> Any:
        recorder = Recorder(may_ask=len(steps) < EAGER_STEPS)

        def noted(kernel: Kernel, device: Any, grid: Any, arguments: ctypes.Structure, **options: Any) -> None:
            recorder.note_launch(kernel, grid, arguments)
            launch(kernel, device, grid, arguments, **options)

        with recorder, mock.patch.object(Kernel, "launch", noted):
            output = step(self, *args)
        steps.append(recorder.calls)
        return output

    with mock.patch.object(CacheGraph, "_step", recorded):
        yield steps
