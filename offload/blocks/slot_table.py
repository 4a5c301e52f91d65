"""SlotTable: which block is in which slot, and the choice of the blocks that a step attends to.

All tensors are on the compute device, with shapes of the capacity, so choosing needs no host synchronisation. A kernel
chooses (``csrc/select.cu``), or the torch operations here, which are its reference: for the same scores both leave the
same blocks resident and active, though perhaps in other slots.

Suffixes: B sequences, G KV heads, R = B·G rows of the table, H query heads, S slots, C block capacity; n: one entry per
moved block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_predictor.arithmetic import scatter_or_drop
from attention_predictor.csrc import ops
from attention_predictor.csrc.ops import ChoiceBounds, Estimates, SlotTensors
from attention_predictor.errors import IntegrityError
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.blocks.selection import ALWAYS, NEVER, Limits
from attention_predictor.predictor.sequences import put_sequence

# A slot's age is one number: when its block was last selected (upper bits), and the block; the smallest leaves first.
# A token's selections are two: at 2 · length within its step, and at 2 · length + 1 for the next token.
# What spare places of the tensors hold.
SPARE = {
    "block_RS": -1,
    "active_RS": -1,
    "use_RS": -1,
    "slot_RC": -1,
    "move_block_RS": 0,
    "move_slot_RS": 0,
    "moves_R": 0,
}
USE_SHIFT = 32


class SlotTable:
    """Maps block to slot and slot to block, for every sequence and KV head of one layer.

    A chosen block that is absent replaces the least recently selected one (empty slots first; of equally old ones the
    lowest block). The move lists say which block is to be fetched to which slot.
    """

    def __init__(self, *, rows: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # inference tensors could not be written to outside of that mode
            slots = torch.full((3, rows, 0), -1, device=device)
            slot_RC, *moves = torch.full((3, rows, 0), -1, dtype=torch.int32, device=device)
            moves_R = torch.zeros(rows, dtype=torch.int32, device=device)
            self.tensors = SlotTensors._make([*slots, slot_RC, *moves, moves_R])
        # Cached: a CUDA graph reads the same tensor at every replay.
        self._deficit_BG: dict[tuple[int, tuple[int, ...]], Tensor | None] = {}

    @property
    def block_RS(self) -> Tensor:
        """int64, the block in each slot, -1 for none."""
        return self.tensors.block_RS

    @property
    def active_RS(self) -> Tensor:
        """int64, the block in each slot that attention reads, -1 for all other slots."""
        return self.tensors.active_RS

    @property
    def resident_RC(self) -> Tensor:
        """bool, True for blocks that are in a slot."""
        return self.tensors.slot_RC >= 0

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(tensor.nbytes for tensor in self.tensors)

    # ---- choosing --------------------------------------------------------------------------------------------------

    def choose(
        self,
        limits: Limits,
        extent: Extent,
        scores: Tensor | Estimates,
        late_blocks: int | None,
        counts: Tensor,
        kernel: bool,
    ) -> Tensor | None:
        """Choose the blocks that the newest token attends to, from scores of its own query.

        Args:
            scores: fp32 score_BGC, ``-inf`` for never; or estimates, whose blocks are ranked by estimated mass. With
                estimates, the exact peaks of resident blocks are written into ``peak_BHC``.
            late_blocks: Most absent blocks to choose; ``None``: choose nothing, only compute the rest.
            counts: int64, as ``DeviceCounts.of_layer``.

        Returns:
            fp32 rest_BH, log-sum-exp of all blocks that are not active; ``None`` without estimates.
        """
        if kernel:
            bounds = self._bounds(limits, extent, self._deficit(limits, extent))
            if isinstance(scores, Estimates):
                return ops.choose_by_estimates(self.tensors, bounds, scores, counts[:2], late=late_blocks)
            if late_blocks is not None:
                scores = scores.contiguous()
                ops.choose_by_scores(self.tensors, bounds, scores, counts[:2], ahead=False, late=late_blocks)
            return None
        sum_BHC: Tensor | None
        if isinstance(scores, Estimates):
            sum_BHC, score_BGC = self._estimated_mass(scores, extent)
        else:
            sum_BHC, score_BGC = None, scores
        if late_blocks is not None:
            resident_BGC = self.resident_RC.view_as(score_BGC)
            absent_BGC = score_BGC.masked_fill(resident_BGC | ~extent.begun_BC[:, None], NEVER)
            reach_BGC = best_blocks(absent_BGC, min(late_blocks, extent.capacity)) | resident_BGC
            score_BGC = score_BGC.masked_fill(~reach_BGC, NEVER)
            chosen_BGC = chosen_blocks(limits, extent, score_BGC, self._deficit(limits, extent))
            self._assign(chosen_BGC, extent, 2 * extent.length_B, counts[:2])
        if sum_BHC is None:
            return None
        active_BGC = self.active_RC(extent.capacity).view(len(sum_BHC), -1, extent.capacity)
        active_BHC = active_BGC.repeat_interleave(sum_BHC.shape[1] // active_BGC.shape[1], 1)
        return torch.logsumexp(sum_BHC.masked_fill(active_BHC, NEVER), -1)

    def choose_ahead(
        self,
        limits: Limits,
        extent: Extent,
        score_BGC: Tensor | None,
        counts: Tensor,
        kernel: bool,
        unspent_BG: Tensor | None = None,
    ) -> None:
        """Choose the blocks that the next token attends to; arguments as in ``choose``.

        Args:
            extent: Before the next token.
            score_BGC: ``None``: only sink and recent.
            unspent_BG: int64, tokens of the limits to leave; ``None``: none.
        """
        deficit_BG = self._deficit(limits, extent)
        if unspent_BG is not None:
            deficit_BG = unspent_BG if deficit_BG is None else deficit_BG + unspent_BG
        if kernel:
            bounds = self._bounds(limits, extent, deficit_BG)
            score_BGC = None if score_BGC is None else score_BGC.contiguous()
            late = extent.capacity
            ops.choose_by_scores(self.tensors, bounds, score_BGC, counts[2:4], ahead=True, late=late)
            return
        B, G = len(extent.length_B), len(self.block_RS) // len(extent.length_B)
        if score_BGC is None:
            score_BGC = torch.full((B, G, extent.capacity), NEVER, device=extent.length_B.device)
        score_BGC = score_BGC.masked_fill(~extent.begun_BC[:, None], NEVER)
        chosen_BGC = chosen_blocks(limits, extent.next, score_BGC, deficit_BG)
        self._assign(chosen_BGC, extent, 2 * extent.length_B + 1, counts[2:4])

    def _bounds(self, limits: Limits, extent: Extent, deficit_BG: Tensor | None) -> ChoiceBounds:
        numbers = (extent.block_size, limits.tokens, limits.sink_blocks, limits.recent)
        return ChoiceBounds(extent.length_B, extent.padding_B, deficit_BG, *numbers)

    def _deficit(self, limits: Limits, extent: Extent) -> Tensor | None:
        """``limits.deficit_BG``, cached."""
        key = len(extent.length_B), limits.deficit
        if key not in self._deficit_BG:
            self._deficit_BG[key] = limits.deficit_BG(key[0], self.block_RS.device)
        return self._deficit_BG[key]

    def _estimated_mass(self, estimates: Estimates, extent: Extent) -> tuple[Tensor, Tensor]:
        """sum_BHC, with exact sums for resident blocks if given; and each block's estimated mass, score_BGC."""
        sum_BHC = estimates.sum_BHC.masked_fill(~extent.begun_BC[:, None], NEVER)
        (B, H, _), R = sum_BHC.shape, len(self.block_RS)
        if estimates.slot_sum_BHS is not None and estimates.slot_peak_BHS is not None:
            block_BHS = self.block_RS.view(B, R // B, -1).repeat_interleave(H * B // R, 1)
            sum_BHC = scatter_or_drop(sum_BHC, block_BHS, estimates.slot_sum_BHS)
            estimates.peak_BHC.copy_(scatter_or_drop(estimates.peak_BHC, block_BHS, estimates.slot_peak_BHS))
        total_BH1 = torch.logsumexp(sum_BHC, -1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
        return sum_BHC, torch.exp(sum_BHC - total_BH1).unflatten(1, (R // B, -1)).sum(2)

    def _assign(self, chosen_BGC: Tensor, extent: Extent, use_B: Tensor, count_2: Tensor) -> None:
        """Give every chosen block a slot, and list the blocks to fetch. A block without tokens yet comes last."""
        table = self.tensors
        block_RS, active_RS, use_RS, slot_RC = table.block_RS, table.active_RS, table.use_RS, table.slot_RC
        (R, S), G = block_RS.shape, chosen_BGC.shape[1]
        chosen_RC, use_R1 = chosen_BGC.flatten(0, 1), use_B.repeat_interleave(G)[:, None]
        begun_RC = extent.begun_BC.repeat_interleave(G, 0)
        kept_RS = (block_RS >= 0) & chosen_RC.gather(1, block_RS.clamp_min(0))
        absent_RC = chosen_RC & (slot_RC < 0)
        # Absent blocks in rising order: one that holds no token yet is the last.
        place_RC = torch.where(absent_RC, absent_RC.cumsum(1) - 1, -1)
        place_RC = place_RC.masked_fill(place_RC >= S, -1)
        block_RC = extent.block_C.expand(R, -1)
        fetched_RS = scatter_or_drop(torch.full_like(block_RS, -1), place_RC, block_RC)
        # Slots by age, oldest first; kept slots come last and are never given away.
        age_RS = torch.where(block_RS < 0, -1, (use_RS << USE_SHIFT) + block_RS)
        given_RS = age_RS.masked_fill(kept_RS, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
        filled_RS = fetched_RS >= 0
        lost_RS = block_RS.gather(1, given_RS).masked_fill(~filled_RS, -1)
        slot_RC.copy_(scatter_or_drop(slot_RC, lost_RS, -1))
        slot_RC.copy_(scatter_or_drop(slot_RC, fetched_RS, given_RS.int()))
        to_RS = given_RS.masked_fill(~filled_RS, -1)
        block_RS.copy_(scatter_or_drop(block_RS, to_RS, fetched_RS))
        active_RS.copy_(
            torch.where(kept_RS, block_RS, scatter_or_drop(torch.full_like(block_RS, -1), to_RS, fetched_RS))
        )
        use_RS.copy_(torch.where(active_RS >= 0, use_R1, use_RS))
        table.move_block_RS.copy_(fetched_RS)
        table.move_slot_RS.copy_(given_RS)
        table.moves_R.copy_((absent_RC & begun_RC).sum(1))
        count_2 += torch.stack([(chosen_RC & begun_RC).sum(), table.moves_R.sum()])

    # ---- for the host -------------------------------------------------------------------------------------------

    def active_RC(self, capacity: int) -> Tensor:
        """bool, True for the blocks that attention reads."""
        empty_RC = torch.zeros((len(self.block_RS), capacity), dtype=torch.bool, device=self.block_RS.device)
        return scatter_or_drop(empty_RC, self.active_RS, True)

    def slot_of(self, block_B: Tensor) -> Tensor:
        """int64 ``[R]``, the slot of block ``block_B`` in every row, -1 where it is not resident."""
        block_R1 = block_B.repeat_interleave(len(self.block_RS) // len(block_B))[:, None]
        return self.tensors.slot_RC.gather(1, block_R1)[:, 0].long()

    def moves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, blocks and slots to fetch; int64 on the CPU."""
        move_block_RS, move_slot_RS, moves_R = (tensor.cpu() for tensor in self.tensors.moves)
        row_n, place_n = (torch.arange(move_block_RS.shape[1]) < moves_R[:, None]).nonzero(as_tuple=True)
        return row_n, move_block_RS[row_n, place_n].long(), move_slot_RS[row_n, place_n].long()

    @torch.inference_mode(False)
    def grow(self, slots: int) -> None:
        """Grow to ``slots`` slots; the new ones are empty."""
        if (more := slots - self.block_RS.shape[1]) < 0:
            raise ValueError(f"slots must be at least {self.block_RS.shape[1]}, got {slots}")
        wider = {
            name: F.pad(getattr(self.tensors, name), (0, more), value=value)
            for name, value in SPARE.items()
            if name.endswith("_RS")
        }
        self.tensors = self.tensors._replace(**wider)

    @torch.inference_mode(False)
    def reserve(self, capacity: int) -> None:
        """Grow the capacity to at least ``capacity`` blocks."""
        more = capacity - self.tensors.slot_RC.shape[1]
        if more > 0:
            self.tensors = self.tensors._replace(slot_RC=F.pad(self.tensors.slot_RC, (0, more), value=-1))

    def drop_from(self, block: int) -> None:
        """Empty the slots of every block from number ``block`` on (the context was cropped, or a block has grown)."""
        for tensor in (self.active_RS, self.block_RS):
            tensor.masked_fill_(tensor >= block, -1)
        self.tensors.slot_RC[:, block:] = -1

    @torch.inference_mode(False)
    def index(self, batch_index: Tensor, kv_heads: int) -> None:
        """Make sequence i what sequence ``batch_index[i]`` was (beams)."""
        picked = (x.unflatten(0, (-1, kv_heads))[batch_index].flatten(0, 1) for x in self.tensors)
        self.tensors = SlotTensors._make(picked)

    def hold_first(self) -> None:
        """Empty all slots but the first of each row, which then holds block 0 and is read."""
        for name, spare in SPARE.items():
            getattr(self.tensors, name).fill_(spare)
        for tensor in (self.block_RS, self.active_RS, self.tensors.slot_RC):
            tensor[:, 0] = 0

    def put(self, place: int, other: SlotTable, kv_heads: int) -> None:
        """Make sequence ``place`` what the only sequence of ``other`` is, in place."""
        for name, spare in SPARE.items():
            mine, theirs = (getattr(table.tensors, name).unflatten(0, (-1, kv_heads)) for table in (self, other))
            put_sequence(mine, place, theirs, spare)

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` unless every resident block has one slot, and both maps agree."""
        table = self.tensors
        block_RS, active_RS, slot_RC = (tensor.cpu() for tensor in (table.block_RS, table.active_RS, table.slot_RC))
        filled, mapped = int((block_RS >= 0).sum()), int((slot_RC >= 0).sum())
        if filled != mapped:
            raise IntegrityError(f"{filled} slots are filled, found {mapped} blocks with a slot")
        for row, slot in (block_RS >= 0).nonzero().tolist():
            block = int(block_RS[row, slot])
            if (back := int(slot_RC[row, block])) != slot:
                raise IntegrityError(f"row {row}: slot {slot} holds block {block}, found under slot {back}")
        if (wrong := int(((active_RS >= 0) & (active_RS != block_RS)).sum())) > 0:
            raise IntegrityError(f"{wrong} active slots hold another block")


def chosen_blocks(limits: Limits, extent: Extent, score_BGC: Tensor, deficit_BG: Tensor | None = None) -> Tensor:
    """The blocks that a step attends to, bool BGC: sink, recent, and the best others up to the limit.

    A sequence within the limit is attended to whole. Blocks that are all padding are never chosen; the sink begins at
    the first real token. If that is within a block, the sink's last tokens are in one block more, which is chosen too
    unless the limit has no block for it beside the most that recent tokens may touch.

    Args:
        score_BGC: ``-inf`` for never.
        deficit_BG: int64, tokens by which a row's limit is lower; ``None``: ``limits.deficit``.
    """
    block_C, length_B1, first_B1 = extent.block_C, extent.length_B[:, None], extent.first_block_B[:, None]
    real_BC = extent.real_BC
    recent_B1 = extent.first_recent_B(limits.recent)[:, None]
    always_BC = real_BC & ((block_C < first_B1 + limits.sink_blocks) | (block_C >= recent_B1))
    if deficit_BG is None:
        deficit_BG = limits.deficit_BG(len(length_B1), block_C.device)
    limit_BG: int | Tensor = limits.tokens if deficit_BG is None else limits.tokens - deficit_BG
    whole_BG1 = (length_B1 <= limit_BG)[:, :, None]
    always_BGC = always_BC[:, None] | (real_BC[:, None] & whole_BG1)
    if extent.padding_B is not None and limits.sink_blocks:
        least = (limits.always_blocks(extent.block_size) + 1) * extent.block_size  # the same at every length
        limit_BG1 = limit_BG if isinstance(limit_BG, int) else limit_BG[:, :, None]
        last_BC = real_BC & (block_C == first_B1 + limits.sink_blocks)
        last_BC = last_BC & (extent.padding_B % extent.block_size > 0)[:, None]
        always_BGC = always_BGC | (last_BC[:, None] & (limit_BG1 >= least))
    score_BGC = score_BGC.masked_fill(~real_BC[:, None], NEVER).masked_fill(always_BGC, ALWAYS)
    count = min(limits.tokens // extent.block_size, extent.capacity)
    count_BG1 = None if deficit_BG is None else ((limits.tokens - deficit_BG) // extent.block_size)[:, :, None]
    return best_blocks(score_BGC, count, count_BG1) | always_BGC


def best_blocks(score_BGC: Tensor, count: int, count_BG1: Tensor | None = None) -> Tensor:
    """Mask of the ``count`` best blocks of each row. Ties go to the lowest block; ``-inf`` is never chosen.

    ``torch.topk`` does not define which of equal scores it takes.

    Args:
        count_BG1: Own count of each row, from 1 to ``count``; ``None``: ``count`` for all.
    """
    if count == 0:
        return torch.zeros_like(score_BGC, dtype=torch.bool)
    best_BGW = score_BGC.topk(count, dim=-1).values
    if count_BG1 is None:
        threshold_BG1 = best_BGW[..., -1:]
    else:
        threshold_BG1 = best_BGW.gather(-1, count_BG1.clamp(max=count) - 1)
    above_BGC, level_BGC = score_BGC > threshold_BG1, (score_BGC == threshold_BG1) & (score_BGC > NEVER)
    left_BG1 = (count if count_BG1 is None else count_BG1) - above_BGC.sum(-1, keepdim=True)
    return above_BGC | (level_BGC & (level_BGC.cumsum(-1) <= left_BG1))
