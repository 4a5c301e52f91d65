"""Fusible: a module whose small operations one kernel can replace, recognised by what it computes.

A copy of the candidate with random weights and the kernel run on the same random input. The module is fusible if both
agree within its type's rounding. Names only decide what to try.
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
FORWARD_ERRORS = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class Fusible:
    """A module that a kernel can replace, and its state when it was found."""

    what: ClassVar[str]  # the kind of module, in the plural, ending in s

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own = type(module).forward
        self._children, self._training = dict(module.named_children()), module.training

    @classmethod
    def find(cls, module: nn.Module, seen: dict[Any, Any]) -> Fusible | None:
        """The fusible module, or ``None`` if the kernel does not apply. ``seen`` caches results of similar modules."""
        raise NotImplementedError

    def is_as_found(self) -> bool:
        """Whether it still has the forward, mode and children that were compared, and no hooks."""
        children = dict(self.module.named_children())
        return (
            type(self.module).forward is self.own
            and self.module.training is self._training
            and is_plain(self.module)
            and children.keys() == self._children.keys()
            and all(child is self._children[name] for name, child in children.items())
        )

    def forward(self) -> Forward:
        """The replacement of the module's forward."""
        raise NotImplementedError


def is_plain(module: nn.Module) -> bool:
    """Whether a module's forward is its class's, and it has no hooks."""
    return "forward" not in vars(module) and not any(getattr(module, name, None) for name in HOOKS)


def takes_one(module: nn.Module) -> bool:
    """Whether its class's forward takes exactly one argument."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())
    return len(parameters) == 2 and all(one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters)


def remembered(seen: dict[Any, Any], module: nn.Module, find: Callable[[], Found]) -> Found:
    """The result of ``find``, cached for modules with the same code and settings."""
    if (key := _settings(module)) not in seen:
        seen[key] = find()
    found: Found = seen[key]
    return found


def _settings(module: nn.Module) -> Any:
    """Everything that a module's forward may depend on, except weight values; hashable."""
    plain = (int, float, str, bool, type(None))
    own = tuple(
        (name, value if isinstance(value, plain) else id(value))
        for name, value in vars(module).items()
        # Not a child's own forward, as divided layers have: it does not change what the module does with it.
        if not name.startswith("_") and name != "forward"
    )
    weights = tuple((name, tuple(x.shape), x.dtype, x.device) for name, x in module.named_parameters(recurse=False))
    return type(module), own, weights, tuple((name, _settings(child)) for name, child in module.named_children())


def shell_of(
    module: nn.Module,
    *,
    parameters: dict[str, nn.Parameter] | None = None,
    children: dict[str, nn.Module] | None = None,
) -> nn.Module:
    """A shallow copy of a module with some parameters and children replaced."""
    shell = copy.copy(module)
    for name, changes in (("_parameters", parameters), ("_modules", children), ("_buffers", None)):
        vars(shell)[name] = {**vars(module)[name], **(changes or {})}
    return shell


def output_of(shell: nn.Module, x: Tensor) -> Tensor | None:
    """The forward's result; ``None`` if it is no tensor, or if the code fails on the shell."""
    try:
        output = shell.forward(x)
    except FORWARD_ERRORS:
        return None
    return output if isinstance(output, Tensor) else None


def random(dtype: torch.dtype, device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    """Normally distributed numbers, without touching torch's global random state."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def alike(found: Tensor, wanted: Tensor) -> bool:
    """Whether shapes and types are the same."""
    return (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
