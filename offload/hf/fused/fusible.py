"""Fusible: a module whose small operations one kernel can do, recognised by what it computes.

The forward of a candidate's class runs beside the kernel on the same random input, in a copy with random weights: what
gives the same within the rounding of its type is taken. Names only say what to try.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]
Found = TypeVar("Found")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OF_THE_CODE = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class Fusible:
    """A module that a kernel serves, as it was found."""

    what: ClassVar[str]  # it is, in the plural, which ends in s

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own = type(module).forward
        self._children, self._training = dict(module.named_children()), module.training

    @classmethod
    def find(cls, module: nn.Module, seen: dict[Any, Any]) -> Fusible | None:
        """``None`` for a module that is something else; ``seen`` remembers what others like it came to."""
        raise NotImplementedError

    def is_as_found(self) -> bool:
        """Whether it still has the forward, mode and parts that were compared, and nobody looks on."""
        children = dict(self.module.named_children())
        return (
            type(self.module).forward is self.own
            and self.module.training is self._training
            and is_plain(self.module)
            and children.keys() == self._children.keys()
            and all(child is self._children[name] for name, child in children.items())
        )

    def forward(self) -> Forward:
        """What to call in place of the module's own forward."""
        raise NotImplementedError


def is_plain(module: nn.Module) -> bool:
    """Whether a module's forward is its class's, and it has no hooks."""
    return "forward" not in vars(module) and not any(getattr(module, name, None) for name in HOOKS)


def takes_one(module: nn.Module) -> bool:
    """Whether the forward of its class takes one argument and no more."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())
    return len(parameters) == 2 and all(one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters)


def remembered(seen: dict[Any, Any], module: nn.Module, find: Callable[[], Found]) -> Found:
    """What ``find`` gives; of modules with the same code and settings, one is looked at."""
    if (key := _settings(module)) not in seen:
        seen[key] = find()
    found: Found = seen[key]
    return found


def _settings(module: nn.Module) -> Any:
    """All that a module's forward may depend on but the values of its weights; hashable."""
    plain = (int, float, str, bool, type(None))
    own = tuple(
        (name, value if isinstance(value, plain) else id(value))
        for name, value in vars(module).items()
        if not name.startswith("_")
    )
    weights = tuple((name, tuple(x.shape), x.dtype, x.device) for name, x in module.named_parameters(recurse=False))
    return type(module), own, weights, tuple((name, _settings(child)) for name, child in module.named_children())


def shell_of(
    module: nn.Module,
    *,
    parameters: dict[str, nn.Parameter] | None = None,
    children: dict[str, nn.Module] | None = None,
) -> nn.Module:
    """A copy of a module with some parameters and children exchanged; the module stays as it is."""
    shell = copy.copy(module)
    for name, changes in (("_parameters", parameters), ("_modules", children), ("_buffers", None)):
        vars(shell)[name] = {**vars(module)[name], **(changes or {})}
    return shell


def output_of(shell: nn.Module, x: Tensor) -> Tensor | None:
    """What its class's forward gives; ``None`` if that is no tensor, or the code needs more than the shell has."""
    try:
        output = shell.forward(x)
    except OF_THE_CODE:
        return None
    return output if isinstance(output, Tensor) else None


def random(dtype: torch.dtype, device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    """Normal numbers; torch's own random state stays as it is."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def alike(found: Tensor, wanted: Tensor) -> bool:
    """Whether shapes and types are the same."""
    return (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
