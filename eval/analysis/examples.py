"""A head's attention map, compressed to be stored in a record; the gallery shows it.

Suffixes: Q steps, N blocks, C columns, T tokens.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attention_predictor.arithmetic import ceil_div
from attention_predictor.errors import DataError

COLUMNS = 512  # most columns of a whole-context map; more blocks share columns
ZOOMED = 12  # blocks that are shown token by token
LEAST = 1e-4  # probability that is drawn as nothing; the scale is logarithmic from there to 1
NEITHER, BOTH, MISSED, NEEDLESS = range(4)  # a block: neither, chosen and best, best only, chosen only


@dataclass(frozen=True)
class Image:
    """A grey image: uint8, row by row, deflated."""

    rows: int
    columns: int
    data: str

    @classmethod
    def of(cls, x_QC: Tensor) -> Image:
        pixels = x_QC.to(torch.uint8).cpu().numpy()
        rows, columns = pixels.shape
        return cls(rows, columns, base64.b64encode(zlib.compress(pixels.tobytes(), 9)).decode())

    def pixels(self) -> np.ndarray:
        """uint8 ``[rows, columns]``; ``DataError`` where the data are of another size."""
        raw = zlib.decompress(base64.b64decode(self.data))
        if len(raw) != self.rows * self.columns:
            raise DataError(f"an image of {self.rows} × {self.columns} has {len(raw)} pixels")
        return np.frombuffer(raw, np.uint8).reshape(self.rows, self.columns)


@dataclass(frozen=True)
class Example:
    """One head's map in one document.

    Attributes:
        head: The head's row of the table.
        whole: Steps by all blocks; ``choice``: which of the blocks were chosen, and which were the best.
        near: Steps by the tokens from ``first_token`` on, where most of the classified mass is.
        blocks_a_column: Blocks in each column of ``whole``.
        first_step: Tokens at the first step.
    """

    head: dict[str, Any]
    whole: Image
    choice: Image
    near: Image
    first_token: int
    blocks_a_column: int
    first_step: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Example:
        images = {name: Image(**values[name]) for name in ("whole", "choice", "near")}
        return cls(**(values | images))


def grey(prob: Tensor) -> Tensor:
    """Probabilities as 0 to 255, on a logarithmic scale from ``LEAST``."""
    return (255 * (1 - prob.clamp_min(LEAST).log10() / np.log10(LEAST))).round().clamp(0, 255)


def pooled(x_QN: Tensor) -> tuple[Tensor, int]:
    """The largest of neighbouring columns, so that there are at most ``COLUMNS``; and how many became one."""
    each = ceil_div(x_QN.shape[-1], COLUMNS)
    padded = torch.nn.functional.pad(x_QN, (0, -x_QN.shape[-1] % each))
    return padded.unflatten(-1, (-1, each)).amax(-1), each


def choices(chosen_QN: Tensor, best_QN: Tensor) -> Tensor:
    """What each block is to a step, uint8: ``NEITHER``, ``BOTH``, ``MISSED`` or ``NEEDLESS``."""
    kind_QN = torch.full(chosen_QN.shape, NEITHER, dtype=torch.uint8, device=chosen_QN.device)
    kind_QN[chosen_QN & best_QN] = BOTH
    kind_QN[~chosen_QN & best_QN] = MISSED
    kind_QN[chosen_QN & ~best_QN] = NEEDLESS
    return kind_QN


def busiest(mass_N: Tensor) -> int:
    """Index of the first of the ``ZOOMED`` neighbouring blocks with the most mass."""
    if len(mass_N) <= ZOOMED:
        return 0
    return int(mass_N.unfold(0, ZOOMED, 1).sum(-1).argmax())
