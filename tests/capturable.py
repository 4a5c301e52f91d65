"""Whether operations could be captured in a CUDA graph, found on a CPU: the host reads nothing, no shape changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result's shape depends on values, or that give a value to the host.
READING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique", "_unique2", "item"}
# Methods that read a tensor on the host without an operation that would be seen.
METHODS = {"cpu", "tolist", "numpy", "__array__", "item", "__bool__", "__int__", "__float__", "__index__"}


class NotCapturable(AssertionError):
    """The host would have to wait for the device."""


class _Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in METHODS:
            raise NotCapturable(f"Tensor.{func.__name__} reads the device")
        return func(*args, **(kwargs or {}))


class Capturable(TorchDispatchMode):
    """Within it, what no CUDA graph could hold raises ``NotCapturable``.

    ``record`` has the name of every operation, the shapes of its tensors and its other arguments: the same for two
    lengths, if these are values on the device alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.record: list[tuple[str, Any, Any]] = []
        self._methods = _Methods()

    def __enter__(self) -> Capturable:
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in READING:
            raise NotCapturable(f"{name} reads the device")
        if name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        ):
            raise NotCapturable(f"{name} by a mask asks how many are True")
        self.record.append((str(func), _form(args), _form(kwargs)))
        return func(*args, **kwargs)


def _form(value: Any) -> Any:
    """An argument without the numbers that lie on the device."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
    if isinstance(value, dict):
        return tuple((name, _form(one)) for name, one in value.items())
    return value
