"""Measures how well a predictor foresees the next step's blocks.

The predictor observes the true scores up to a step and chooses blocks for the next one, as the engine does ahead. All
scores are true and no block is fetched late, so this measures the predictability of attention, without errors of the
sketch or of sparse decoding.

Suffixes: B sequences, G KV heads, Q steps, N blocks, R prompt rows, C state channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_predictor.offload.attention.dense import ScoreRows
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.blocks.selection import Selection
from attention_predictor.offload.blocks.slot_table import chosen_blocks
from attention_predictor.predictor.base import AttentionPredictor
from attention_predictor.predictor.history import ScoreHistory
from attention_predictor.predictor.model import new_history
from attention_predictor.predictor.scores import MIN_MASS, recovery


@dataclass(frozen=True)
class Foreseen:
    """Recovery of a predictor's choices by KV head, mean over steps.

    Attributes:
        share_BG: Recovery: share of the true mass on the chosen blocks.
        relative_BG: Its ratio to that of the best choice within the budget.
        far_BG: The same of what lies beyond sink and recent alone, which take no foresight; all steps together, so
            that a step counts by the mass it has there. NaN where there is none.
        chosen_BGQN, best_BGQN: bool, the blocks.
    """

    share_BG: Tensor
    relative_BG: Tensor
    far_BG: Tensor
    chosen_BGQN: Tensor
    best_BGQN: Tensor


class Predictability:
    """Runs a predictor over one layer's steps.

    Args:
        rows_BGRN: True block scores of the last prompt queries.
    """

    def __init__(self, predictor: AttentionPredictor, rows_BGRN: Tensor) -> None:
        B, G = rows_BGRN.shape[:2]
        self.history: ScoreHistory = new_history(predictor, batch=B, kv_heads=G, device=rows_BGRN.device, kernels=False)
        self.history.start(rows_BGRN)

    def repeat(self, sequences: int) -> None:
        """Repeat the one sequence, history included."""
        self.history.index(torch.zeros(sequences, dtype=torch.int64))

    @torch.no_grad()
    def over(self, rows: ScoreRows, length: int, selection: Selection) -> Foreseen:
        """Choose blocks for each step and compare with the true scores.

        Args:
            rows: True rows of the steps; columns of blocks that a step does not know are zero.
            length: Tokens at the last step.
        """
        (B, _, Q, N), device = rows.mass_BGQN.shape, rows.mass_BGQN.device
        chosen: list[Tensor] = []
        best: list[Tensor] = []
        far: list[Tensor] = []
        lengths = range(length - Q + 1, length + 1)
        # Steps with the same blocks to choose from, a block's worth of tokens, go together: much less work.
        alike = groupby(lengths, key=lambda tokens: (*selection.candidates(tokens), selection.n_blocks(tokens)))
        for (first, last, blocks), same in alike:
            tokens = list(same)
            steps = slice(tokens[0] - lengths[0], tokens[-1] - lengths[0] + 1)
            known, states = min(last, self.history.n_blocks), []
            for row_BGN in rows.scores_BGQN[:, :, steps, :blocks].unbind(2):
                states.append(self.history.state_BGNC[:, :, first:known].clone())
                self.history.push(row_BGN)
            length_B = torch.full((len(tokens) * B,), tokens[0], device=device)
            extent, limits = Extent(length_B, None, blocks, selection.block_size), selection.limits(tokens[0])
            truth_BGN = rows.mass_BGQN[:, :, steps, :blocks].movedim(2, 0).flatten(0, 1)
            for found, scores_BGN in ((chosen, self._predict(torch.cat(states), first)), (best, truth_BGN)):
                scores_BGN = F.pad(scores_BGN, (0, blocks - scores_BGN.shape[-1]), value=-torch.inf)
                mask_BGN = F.pad(chosen_blocks(limits, extent, scores_BGN), (0, N - blocks))
                found.append(mask_BGN.unflatten(0, (-1, B)).movedim(0, 2))
            far_N = torch.zeros(N, dtype=torch.bool, device=device)
            far_N[first:last] = True
            far.append(far_N.expand(len(tokens), N))
        return _compare(rows.mass_BGQN, torch.cat(chosen, 2), torch.cat(best, 2), torch.cat(far))

    def _predict(self, state_BGNC: Tensor, first: int) -> Tensor:
        """Scores ``[B, G, first + N]`` by the states of the blocks from ``first`` on; none for those before."""
        scores_BGN = state_BGNC.new_empty(state_BGNC.shape[:-1], dtype=torch.float32)
        if scores_BGN.shape[-1]:
            scores_BGN = self.history.predictor(state_BGNC).float()
        return F.pad(scores_BGN, (first, 0), value=-torch.inf)


def _compare(mass_BGQN: Tensor, chosen_BGQN: Tensor, best_BGQN: Tensor, far_QN: Tensor) -> Foreseen:
    found = recovery(mass_BGQN, chosen_BGQN, best_BGQN)
    far_got_BG, far_most_BG = ((mass_BGQN * (x & far_QN)).sum((-2, -1)) for x in (chosen_BGQN, best_BGQN))
    return Foreseen(
        share_BG=found.share.mean(-1),
        relative_BG=found.relative.mean(-1),
        far_BG=far_got_BG / far_most_BG.where(far_most_BG > MIN_MASS, torch.full_like(far_most_BG, torch.nan)),
        chosen_BGQN=chosen_BGQN,
        best_BGQN=best_BGQN,
    )
