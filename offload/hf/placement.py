"""Placement: on which devices a model's layers compute, from its weights and accelerate's hooks.

accelerate (``device_map``, ``cpu_offload``) hooks modules: a hook moves a module's inputs to its execution device and,
for weights kept elsewhere, brings them there for the forward. Such weights are on ``meta`` meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from attention_predictor.errors import AttachError

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model computes.

    Attributes:
        layers: Where each full-attention layer asked for computes, by number.
        devices: All devices that modules with weights compute on, in the order of the modules.
        brought: Whether hooks bring weights for each forward.
    """

    layers: dict[int, torch.device]
    devices: tuple[torch.device, ...]
    brought: bool

    @classmethod
    def of(cls, model: PreTrainedModel, decoder: nn.Module, layers: list[int]) -> Placement:
        """The placement of a model, and of the ``layers`` of its ``decoder``.

        Raises:
            AttachError: Weights are nowhere, or on devices between which no hook moves what the model computes, or on
                other devices than CPUs and CUDA devices.
        """
        name, hooks = type(model).__name__, _Hooks(model)
        devices = tuple(dict.fromkeys(hooks.devices(model)))
        if META in devices:
            raise AttachError(f"{name} has weights on no device (meta), which no hook loads: load it with its weights")
        if not devices:
            raise AttachError(f"{name} has no weights")
        names = ", ".join(map(str, devices))
        if odd := [device for device in devices if device.type not in ("cpu", "cuda")]:
            raise AttachError(f"{name} is on {odd[0]}: only CPU and CUDA devices are supported")
        if len(devices) > 1 and not hooks.found:
            raise AttachError(f"{name} is on several devices ({names}) without hooks: load it with device_map")
        numbered: dict[int, nn.Module] = {}
        for module in decoder.modules():
            if isinstance(number := getattr(module, "layer_idx", None), int):
                numbered.setdefault(number, module)
        found = {number: next(hooks.devices(numbered.get(number, model)), devices[0]) for number in layers}
        return cls(found, devices, hooks.bring)

    @property
    def inputs(self) -> torch.device:
        """Where the model takes its inputs."""
        return self.devices[0]

    @property
    def has_gpu(self) -> bool:
        """Whether any module computes on a GPU."""
        return any(device.type == "cuda" for device in self.devices)

    @property
    def why_not_captured(self) -> str | None:
        """Why steps of a model that is placed so can't be captured; ``None`` if they can."""
        if len(self.devices) > 1:
            return f"the model computes on several devices ({', '.join(map(str, self.devices))})"
        return "hooks bring the model's weights for each forward" if self.brought else None


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs. ``model.device`` is ``meta`` if hooks bring its first weights."""
    return next(_Hooks(model).devices(model))


class _Hooks:
    """accelerate's hooks of a model, by module, with those of the modules that contain it.

    Attributes:
        found: Whether there are any.
        bring: Whether any brings weights for each forward.
    """

    def __init__(self, model: nn.Module) -> None:
        self._execution: dict[int, torch.device] = {}  # by id of the module
        self.found = self.bring = False
        self._visit(model, None)

    def _visit(self, module: nn.Module, outer: torch.device | None) -> None:
        for hook in _hooks_of(module):
            self.found = True
            if (given := getattr(hook, "execution_device", None)) is not None:
                outer = _device(given)
                # A hook that does not say whether it offloads moves the whole module there and back.
                self.bring = self.bring or getattr(hook, "offload", True)
        if outer is not None:
            self._execution[id(module)] = outer
        for child in module.children():
            self._visit(child, outer)

    def devices(self, module: nn.Module) -> Iterator[torch.device]:
        """Of each weight within a module, the device where it is used, which may not be where it is kept."""
        for part in module.modules():
            own = self._execution.get(id(part))
            for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
                yield own if own is not None else tensor.device


def _hooks_of(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))  # a SequentialHook has several


def _device(given: int | str | torch.device) -> torch.device:
    """A device as tensors have it: a CUDA device with its number, a CPU without."""
    device = torch.device("cuda", given) if isinstance(given, int) else torch.device(given)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device
