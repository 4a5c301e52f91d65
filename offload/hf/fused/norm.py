"""FusibleNorm: a root-mean-square normalisation. Suffix: W elements of a row, ``_xW`` any dimensions before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attention_predictor.csrc import ops
from attention_predictor.csrc.binding import ELEMENTS
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

EPS_NAMES = ("variance_epsilon", "eps")
SHAPE = (2, 8, 4)  # of a random input, before its rows
# Share of elements that may differ: another summation order changes fewer roundings, another form changes more.
MAX_DIFFERING = 0.01


class FusibleNorm(Fusible):
    """An RMS norm whose weight is its only parameter."""

    what = "norms"

    def __init__(self, module: nn.Module, weight_W: nn.Parameter, eps_name: str, form: ops.Form) -> None:
        super().__init__(module)
        self._shape, self._eps_name, self._form = weight_W.shape, eps_name, form

    @classmethod
    def find(cls, module: nn.Module, seen: dict[Any, Any]) -> FusibleNorm | None:
        parameters, eps_name = dict(module.named_parameters()), _eps_name(module)
        if eps_name is None or parameters.keys() != {"weight"} or not takes_one(module):
            return None
        weight_W = parameters["weight"]
        if weight_W.dim() != 1 or weight_W.dtype not in ELEMENTS or next(module.buffers(), None) is not None:
            return None
        eps = getattr(module, eps_name)
        form = remembered(seen, module, lambda: _form(module, weight_W, eps))
        return None if form is None else cls(module, weight_W, eps_name, form)

    def is_as_found(self) -> bool:
        return super().is_as_found() and getattr(self.module.weight, "shape", None) == self._shape

    def forward(self) -> Forward:
        own, weight_W, form = self.own.__get__(self.module), self.module.weight, self._form
        eps = getattr(self.module, self._eps_name)
        assert isinstance(weight_W, Tensor)

        def forward(x_xW: Tensor) -> Tensor:
            fits = (x_xW.dtype, x_xW.device, x_xW.shape[-1]) == (weight_W.dtype, weight_W.device, len(weight_W))
            return ops.rms_norm(x_xW, weight_W, eps, form) if fits else own(x_xW)

        return forward


def _eps_name(module: nn.Module) -> str | None:
    return next((name for name in EPS_NAMES if isinstance(vars(module).get(name), float)), None)


def _form(module: nn.Module, weight_W: Tensor, eps: float) -> ops.Form | None:
    """The first form of the kernel that agrees with the module, or ``None``."""
    dtype, device, width = weight_W.dtype, weight_W.device, len(weight_W)
    random_W, x_xW = random(dtype, device, width, seed=1), random(dtype, device, *SHAPE, width)
    x_xW[:, ::2] *= max(eps, 1e-12) ** 0.5  # small rows, where eps matters
    wanted_xW = output_of(shell_of(module, parameters={"weight": nn.Parameter(random_W, requires_grad=False)}), x_xW)
    if wanted_xW is None or not alike(x_xW, wanted_xW):
        return None
    # The sum of squares is taken in another order: allow for some units in the last place.
    half = dtype.itemsize == 2
    allowed_xW = (2 if half else 16) * torch.finfo(dtype).eps * wanted_xW.double().abs() + torch.finfo(dtype).tiny
    for form in ops.Form:
        off_xW = (ops.rms_norm(x_xW, random_W, eps, form).double() - wanted_xW.double()).abs()
        if bool((off_xW <= allowed_xW).all()) and not (half and float((off_xW > 0).double().mean()) > MAX_DIFFERING):
            return form
    return None
