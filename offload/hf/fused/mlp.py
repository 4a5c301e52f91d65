"""FusibleMlp: a gated MLP. Suffix: W elements of a row, ``_xW`` any dimensions before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attention_predictor.csrc import ops
from attention_predictor.csrc.binding import ELEMENTS
from attention_predictor.csrc.gate import gate_up_by_torch
from attention_predictor.offload.hf.fused.fusible import (
    Forward,
    Fusible,
    alike,
    output_of,
    random,
    remembered,
    shell_of,
    takes_one,
)

DOWN, BOTH = "down_proj", "gate_up_proj"
FORMS = ({"gate_proj", "up_proj", DOWN}, {BOTH, DOWN})  # its linear layers
SHAPE, HIDDEN, INNER = (8, 4), 48, 80  # of a random input, and of the linear layers that it goes through


class FusibleMlp(Fusible):
    """down(act(gate(x)) · up(x)) with plain linear layers; gate and up may be one layer."""

    what = "MLPs"

    def __init__(self, module: nn.Module, activation: ops.Activation) -> None:
        super().__init__(module)
        self._activation = activation

    @classmethod
    def find(cls, module: nn.Module, seen: dict[Any, Any]) -> FusibleMlp | None:
        linear = {name: child for name, child in module.named_children() if type(child) is nn.Linear}
        if linear.keys() not in FORMS or not takes_one(module) or linear[DOWN].weight.dtype not in ELEMENTS:
            return None
        if {id(x) for x in module.parameters()} - {id(x) for child in linear.values() for x in child.parameters()}:
            return None
        activation = remembered(seen, module, lambda: _activation(module, linear))
        return None if activation is None else cls(module, activation)

    def forward(self) -> Forward:
        return _forward(self.module, functools.partial(ops.gate_up, activation=self._activation))


def _forward(module: Any, gate_up: Callable[[Tensor, Tensor], Tensor]) -> Forward:
    def apart(x_xW: Tensor) -> Tensor:
        return module.down_proj(gate_up(module.gate_proj(x_xW), module.up_proj(x_xW)))

    def together(x_xW: Tensor) -> Tensor:
        return module.down_proj(gate_up(*module.gate_up_proj(x_xW).chunk(2, dim=-1)))

    return together if hasattr(module, BOTH) else apart


def _activation(module: nn.Module, linear: Mapping[str, nn.Linear]) -> ops.Activation | None:
    """Found in fp32, since half precision hides the difference of the two gelus; then checked in the module's type."""
    dtype, device = linear[DOWN].weight.dtype, linear[DOWN].weight.device
    shell, x_xW = _shell(module, linear, torch.float32, device), random(torch.float32, device, *SHAPE, HIDDEN)
    wanted_xW = output_of(shell, x_xW)
    gates = {activation: functools.partial(gate_up_by_torch, activation=activation) for activation in ops.Activation}
    fitting = [one for one, gate in gates.items() if _is_close(_forward(shell, gate)(x_xW), wanted_xW, 1e-5)]
    if len(fitting) != 1:
        return None
    shell, x_xW = _shell(module, linear, dtype, device), x_xW.to(dtype)
    found_xW = _forward(shell, functools.partial(ops.gate_up, activation=fitting[0]))(x_xW)
    return fitting[0] if _is_close(found_xW, output_of(shell, x_xW), 2 * torch.finfo(dtype).eps) else None


def _shell(module: nn.Module, linear: Mapping[str, nn.Linear], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The module with small random layers. A forward that depends on their size fails."""
    children: dict[str, nn.Module] = {}
    for seed, (name, child) in enumerate(linear.items()):
        inputs, outputs = (INNER, HIDDEN) if name == DOWN else (HIDDEN, 2 * INNER if name == BOTH else INNER)
        bias = child.bias is not None
        made = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, device=device, dtype=dtype)
        for number, parameter in enumerate(made.parameters()):
            scale = 2 * inputs**-0.5 if parameter.dim() == 2 else 0.5  # large enough to distinguish activations
            parameter.requires_grad_(False).copy_(
                scale * random(dtype, device, *parameter.shape, seed=2 * seed + number)
            )
        children[name] = made
    return shell_of(module, children=children)


def _is_close(found_xW: Tensor, wanted_xW: Tensor | None, share: float) -> bool:
    """Whether all elements agree within ``share`` of the largest one."""
    if wanted_xW is None or not alike(found_xW, wanted_xW):
        return False
    return float((found_xW.double() - wanted_xW.double()).abs().max()) <= share * float(wanted_xW.double().abs().max())
