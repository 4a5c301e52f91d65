"""Classifies attention maps into patterns (TAPPA, arXiv 2601.21709).

TAPPA separates predictable patterns, re-access (vertical lines), sequential (diagonals) and seasonal (periodic
diagonals), from unpredictable maps. The thresholds are ours.

A map has a row for each of Q consecutive steps and a column for each token. Only a part of it is classified: ``far``,
the tokens beyond sink and recent, which are always kept; or ``all``, for a head with less than ``FAR`` of its mass
there. Every figure is a share of the attention mass within that part, so steps count by their mass.

- *vertical*: the overlap of neighbouring steps, token by token. *Diagonal*: the overlap with the earlier step shifted
  by one token. *Chance*: the median overlap over the arbitrary shifts ``SHIFTS``. Vertical and diagonal are given above
  chance, ``(x − chance) / (1 − chance)``; the divisor is at least ``ROOM``, so that small irregularities are no line.
- *echo*: the autocorrelation of the profile over distance (mass d tokens back, summed over steps) at a period, above
  its minimum at shorter distances: parallel diagonals, one period of tokens apart.
- *return*: the overlap of two steps one period apart, block by block, above its minimum at shorter distances: columns
  that return after a period of steps.
- *focus*: the sum of a step's squared shares; its inverse is the effective number of tokens.

The pattern is the first that applies:

1. ``seasonal``: diagonal ``HOLDS`` and echo is at least ``ECHO``; or return is at least ``RETURN``;
2. ``sequential`` or ``re-access``: diagonal, or vertical, ``HOLDS``, and is the larger of the two;
3. ``retrieval``: the mass is on few tokens (focus at least ``FOCUS``), which change from step to step;
4. ``unpredictable``: no pattern, or evenly spread attention.

Suffixes: B sequences, H query heads, Q steps, T tokens of a chunk, N blocks, X distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention_predictor.offload.blocks.selection import Selection

CLASSES = ("re-access", "sequential", "seasonal", "retrieval", "unpredictable")
FAR = 0.1  # share of mass beyond sink and recent from which only that part is classified
HOLDS = 0.3  # share of the overlap that is possible beyond chance
ROOM = 0.25
ECHO, RETURN = 0.25, 0.25
FOCUS = 1 / 32  # the mass is on two blocks' worth of tokens
SHIFTS = (5, 11, 23, 47)  # tokens; no two have a small common period
DISTANCES = 2048  # tokens back, as far as the profile reaches
PERIODS = range(3, 257)  # tokens or steps; a shorter period looks like a line with gaps
NEARLY = 0.9  # share of the highest peak; the first such peak is the period, later ones its multiples


@dataclass(frozen=True)
class Measures:
    """Figures of one head's map; the module docstring defines them.

    Attributes:
        part: ``far`` or ``all``.
        far_mass: Share of the mass beyond sink and recent.
        echo_period, return_period: Periods in tokens and in steps; 0 for none.
    """

    part: str
    far_mass: float
    vertical: float
    diagonal: float
    chance: float
    echo: float
    echo_period: int
    back: float
    back_period: int
    focus: float

    @classmethod
    def of(cls, part: str, *figures: float) -> Measures:
        """From all as numbers, in order."""
        far_mass, vertical, diagonal, chance, echo, echo_period, back, back_period, focus = figures
        lines = (far_mass, vertical, diagonal, chance)
        return cls(part, *lines, echo, int(echo_period), back, int(back_period), focus)

    @property
    def pattern(self) -> str:
        """One of ``CLASSES``."""
        if self.period is not None:
            return "seasonal"
        if max(self.vertical, self.diagonal) >= HOLDS:
            return "sequential" if self.diagonal > self.vertical else "re-access"
        return "retrieval" if self.focus >= FOCUS else "unpredictable"

    @property
    def period(self) -> tuple[int, str] | None:
        """The period of a seasonal map, in ``tokens`` or ``steps``."""
        if self.diagonal >= HOLDS and self.echo >= ECHO:
            return self.echo_period, "tokens"
        if self.back >= RETURN:
            return self.back_period, "steps"
        return None

    @property
    def clarity(self) -> float:
        """Strength of the pattern: the figure that decided it, or for ``unpredictable`` the absence of all."""
        lines = max(self.vertical, self.diagonal)
        return {
            "seasonal": max(self.echo, self.back),
            "sequential": self.diagonal - max(self.vertical, 0),
            "re-access": self.vertical - max(self.diagonal, 0),
            "retrieval": self.focus * (HOLDS - lines),
            "unpredictable": (HOLDS - lines) * (FOCUS - self.focus),
        }[self.pattern]


class Part:
    """The part of each head's map to classify.

    Args:
        mass_BHQN: fp32, every step's mass of every block.
        length: Tokens at the last step.
        selection: Defines sink and recent tokens.
    """

    def __init__(self, mass_BHQN: Tensor, length: int, selection: Selection) -> None:
        Q, N = mass_BHQN.shape[-2:]
        device = mass_BHQN.device
        self.position_Q = torch.arange(length - Q, length, device=device)
        bounds = [selection.candidates(position + 1) for position in self.position_Q.tolist()]
        first, last_Q = bounds[0][0], torch.tensor([last for _, last in bounds], device=device)
        block_N = torch.arange(N, device=device)
        far_QN = (block_N >= first) & (block_N < last_Q[:, None])
        total_BH = mass_BHQN.sum((-2, -1)).clamp_min(1e-12)
        self.far_mass_BH = (mass_BHQN * far_QN).sum((-2, -1)) / total_BH
        self.far_BH = self.far_mass_BH >= FAR
        self.mass_BHQN = mass_BHQN.where(far_QN | ~self.far_BH[..., None, None], torch.zeros_like(mass_BHQN))
        self.first_token = first * selection.block_size
        self.end_Q = last_Q * selection.block_size  # one past the last far token

    def cut(self, start: int, prob_BHQT: Tensor) -> Tensor:
        """Probabilities of the tokens from ``start`` on, zero outside of the part."""
        token_T = torch.arange(start, start + prob_BHQT.shape[-1], device=prob_BHQT.device)
        far_QT = (token_T >= self.first_token) & (token_T < self.end_Q[:, None])
        return prob_BHQT.where(far_QT | ~self.far_BH[..., None, None], torch.zeros_like(prob_BHQT))


class MapSums:
    """Sums over a map, added up in column chunks."""

    def __init__(self, part: Part) -> None:
        self.part, self.mass_BHQN = part, part.mass_BHQN
        B, H, Q, _ = part.mass_BHQN.shape
        zeros_BH = part.mass_BHQN.new_zeros(B, H)
        self.in_common = {shift: zeros_BH.clone() for shift in (0, 1, *SHIFTS)}
        self.square_BHQ = part.mass_BHQN.new_zeros(B, H, Q)
        self.profile_BHX = part.mass_BHQN.new_zeros(B, H, DISTANCES)
        self.before_BHQT = part.mass_BHQN.new_zeros(B, H, Q, max(SHIFTS))  # columns left of the next ones

    def add(self, start: int, prob_BHQT: Tensor) -> None:
        """The next columns: probabilities of tokens ``start`` on, as ``Part.cut`` leaves them."""
        T, halo = prob_BHQT.shape[-1], max(SHIFTS)
        wide_BHQT = torch.cat([self.before_BHQT, prob_BHQT], -1)
        for shift, sum_BH in self.in_common.items():
            earlier_BHQT = wide_BHQT[:, :, :-1, halo - shift : halo - shift + T]
            sum_BH += torch.minimum(prob_BHQT[:, :, 1:], earlier_BHQT).sum((-2, -1))
        self.before_BHQT = wide_BHQT[..., -halo:]
        self.square_BHQ += prob_BHQT.square().sum(-1)
        self._add_profile(start, prob_BHQT)

    def _add_profile(self, start: int, prob_BHQT: Tensor) -> None:
        position_Q, T = self.part.position_Q, prob_BHQT.shape[-1]
        skip = max(int(position_Q[0]) - DISTANCES + 1 - start, 0)  # too far back for all steps
        if skip >= T:
            return
        token_T = torch.arange(start + skip, start + T, device=prob_BHQT.device)
        distance_QT = position_Q[:, None] - token_T
        seen_QT = (distance_QT >= 0) & (distance_QT < DISTANCES)
        self.profile_BHX.index_add_(-1, distance_QT[seen_QT], prob_BHQT[..., skip:][..., seen_QT])

    def measures(self) -> list[list[Measures]]:
        """Of every sequence and head."""
        mass_BHQ = self.mass_BHQN.sum(-1)
        total_BH = mass_BHQ.sum(-1).clamp_min(1e-12)
        pairs_BH = torch.minimum(mass_BHQ[..., 1:], mass_BHQ[..., :-1]).sum(-1).clamp_min(1e-12)
        shares = {shift: sum_BH / pairs_BH for shift, sum_BH in self.in_common.items()}
        chance_BH = torch.stack([shares[shift] for shift in SHIFTS]).quantile(0.5, dim=0)
        above = [(shares[shift] - chance_BH) / (1 - chance_BH).clamp_min(ROOM) for shift in (0, 1)]
        # A step's squares are of its mass; a share of it counts by its mass.
        focus_BH = (self.square_BHQ / mass_BHQ.clamp_min(1e-12)).sum(-1) / total_BH
        echo, back = _strongest(self._echoes()), _strongest(self._returns())
        figures = (self.part.far_mass_BH, *above, chance_BH, *echo, *back, focus_BH)
        rows = torch.stack([x.double() for x in figures], -1).tolist()
        parts = [["far" if is_far else "all" for is_far in of_heads] for of_heads in self.part.far_BH.tolist()]
        return [
            [Measures.of(part, *row) for part, row in zip(of_heads, of_sequence, strict=True)]
            for of_heads, of_sequence in zip(parts, rows, strict=True)
        ]

    def _echoes(self) -> Tensor:
        """What the profile has in common with itself, by distance from 0 on, as a share of all."""
        profile_BHX = self.profile_BHX
        shares = [
            torch.minimum(profile_BHX[..., d:], profile_BHX[..., : DISTANCES - d]).sum(-1)
            for d in range(PERIODS.stop + 1)
        ]
        return torch.stack(shares, -1) / profile_BHX.sum(-1, keepdim=True).clamp_min(1e-12)

    def _returns(self) -> Tensor:
        """What steps have in common, block by block, by steps between them from 0 on; up to half of all steps."""
        mass_BHQ, Q = self.mass_BHQN.sum(-1), self.mass_BHQN.shape[2]
        shares = []
        for d in range(min(PERIODS.stop, Q // 2) + 1):
            later, earlier = slice(d, None), slice(None, Q - d)
            both_BH = torch.minimum(self.mass_BHQN[:, :, later], self.mass_BHQN[:, :, earlier]).sum((-2, -1))
            most_BH = torch.minimum(mass_BHQ[..., later], mass_BHQ[..., earlier]).sum(-1)
            shares.append(both_BH / most_BH.clamp_min(1e-12))
        return torch.stack(shares, -1)


def _strongest(share_BHX: Tensor) -> tuple[Tensor, Tensor]:
    """Height and place of the peak that stands highest above the least before it, or of the first nearly as high.

    Zeros where there is none.
    """
    if share_BHX.shape[-1] < PERIODS.start + 2:
        zeros_BH = torch.zeros_like(share_BHX[..., 0])
        return zeros_BH, zeros_BH
    height_BHX = share_BHX - share_BHX.cummin(-1).values
    before, inner, behind = share_BHX[..., :-2], share_BHX[..., 1:-1], share_BHX[..., 2:]
    peak_BHX = height_BHX[..., 1:-1].where((inner >= before) & (inner >= behind), torch.zeros_like(inner))
    peak_BHX[..., : PERIODS.start - 1] = 0
    most_BH1 = peak_BHX.amax(-1, keepdim=True)
    place_BH1 = (peak_BHX >= NEARLY * most_BH1).float().argmax(-1, keepdim=True)  # the first peak nearly as high
    height_BH1 = peak_BHX.gather(-1, place_BH1)
    return height_BH1[..., 0], ((place_BH1 + 1) * (height_BH1 > 0))[..., 0].to(share_BHX.dtype)


def most_common(patterns: Sequence[str]) -> str:
    """The most common pattern; ties go to the first of ``CLASSES``."""
    return max(CLASSES, key=lambda name: (patterns.count(name), -CLASSES.index(name)))
