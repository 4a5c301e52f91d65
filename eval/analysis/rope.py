"""RoPE: undoes a model's rotation, and splits attention logits by channel pair.

RoPE (RoFormer, arXiv 2104.09864) turns pairs of channels by an angle that grows with the position. Model families
differ in which channels form a pair and whether all of them turn. Both are found by applying the family's own function
to probe vectors.

Suffixes: B sequences, H query heads, Q tokens, D head size, R angles as the model has them, P pairs.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FUNCTION = "apply_rotary_pos_emb"  # name of the function in transformers' model modules


@dataclass(frozen=True)
class Rotation:
    """The rotation of Q consecutive tokens: channel i becomes ``cos · x_i + sin · x_partner(i)``.

    Attributes:
        cos_QD, sin_QD: fp32, the sign of the turn included; 1 and 0 for a channel that is not turned. Some models
            (YaRN) make rotated vectors longer, too.
        partner_D: int64; a channel that is not turned is its own.
    """

    cos_QD: Tensor
    sin_QD: Tensor
    partner_D: Tensor

    @classmethod
    def of(cls, layer: nn.Module, cos_BQR: Tensor, sin_BQR: Tensor, head_dim: int) -> Rotation | None:
        """The rotation of ``layer`` from its inputs; ``None`` if its module has no rotation function."""
        function = getattr(sys.modules[type(layer).__module__], FUNCTION, None)
        if function is None:
            return None
        cos_1QR, sin_1QR = cos_BQR[:1].float(), sin_BQR[:1].float()
        turn = _turner(function, head_dim, cos_1QR)
        ones_QD = torch.ones(cos_1QR.shape[1], head_dim, device=cos_BQR.device)
        nothing_1QR, unit_1QR = torch.zeros_like(cos_1QR), torch.ones_like(cos_1QR)
        # A quarter turn of each unit vector shows where a channel goes, and with which sign.
        quarter_DD = turn(torch.eye(head_dim, device=cos_BQR.device), nothing_1QR[:, :1], unit_1QR[:, :1])
        partner_D = quarter_DD.abs().argmax(0)
        turned_D = partner_D != torch.arange(head_dim, device=cos_BQR.device)
        sin_QD = turn(ones_QD, nothing_1QR, sin_1QR)
        cos_QD = turn(ones_QD, cos_1QR, nothing_1QR)
        return cls(cos_QD, sin_QD.where(turned_D, torch.zeros_like(sin_QD)), partner_D)

    def undo(self, x_BHQD: Tensor) -> Tensor:
        """Vectors as they were before they were rotated, fp32."""
        x_BHQD = x_BHQD.float()
        back_BHQD = self.cos_QD * x_BHQD - self.sin_QD * x_BHQD[..., self.partner_D]
        return back_BHQD / (self.cos_QD**2 + self.sin_QD**2)

    @property
    def first_P(self) -> Tensor:
        """int64, the lower channel of every pair, in the order of their channels."""
        channel_D = torch.arange(len(self.partner_D), device=self.partner_D.device)
        return channel_D[self.partner_D > channel_D]

    @property
    def wavelengths(self) -> list[float]:
        """Tokens in which each pair turns once, ``[P]``; needs two tokens or more, and more for longer ones."""
        cos_QP, sin_QP = self.cos_QD[:, self.first_P].double(), self.sin_QD[:, self.first_P].double()
        angle_QP = torch.atan2(sin_QP, cos_QP)

        def turned(tokens: int) -> Tensor:
            return torch.remainder(angle_QP[tokens] - angle_QP[0] + math.pi, math.tau).sub(math.pi).abs()

        # Slow pairs hardly turn from one token to the next; their turn over many tokens is more exact.
        far = len(angle_QP) - 1
        near_P, far_P = turned(1), turned(far) / far
        step_P = far_P.where(near_P * far < math.pi / 2, near_P)
        return (math.tau / step_P.clamp_min(1e-12)).tolist()

    def by_pair(self, product_BHD: Tensor) -> Tensor:
        """Products of rotated channels summed by pair, ``[B, H, P + 1]``; last, all channels that are not turned."""
        paired_BHP = product_BHD[..., self.first_P] + product_BHD[..., self.partner_D[self.first_P]]
        return torch.cat([paired_BHP, product_BHD.sum(-1, keepdim=True) - paired_BHP.sum(-1, keepdim=True)], -1)


def _turner(function: Callable[..., object], head_dim: int, cos_1QR: Tensor) -> Callable[..., Tensor]:
    """The family's function as one of vectors ``[Q, D]`` with their cosines and sines.

    Some families turn a part of the channels outside of it: then it takes no more than the first ones.
    """
    both = len([one for one in inspect.signature(function).parameters.values() if one.default is one.empty]) == 4

    def plain(x_QD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x_11QD = x_QD[None, None]
        found = function(x_11QD, x_11QD, cos, sin)[0] if both else function(x_11QD, cos, sin)  # type: ignore[index]
        assert isinstance(found, Tensor)
        return found[0, 0]

    def first(x_QD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = cos.shape[-1]
        return torch.cat([plain(x_QD[:, :turned], cos, sin), x_QD[:, turned:]], -1)

    try:
        plain(torch.ones(cos_1QR.shape[1], head_dim, device=cos_1QR.device), cos_1QR, cos_1QR)
    except RuntimeError:  # shapes that don't fit
        return first
    return plain
