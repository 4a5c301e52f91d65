"""KeySketch: a few-bit copy of every key, small enough to stay on the device and be read every step.

Suffixes: B sequences, G KV heads, H query heads, h query heads of one KV head, Q queries, T tokens, K groups
of tokens, J bytes of a group (several tokens each), D head size, R channels with codes, C those of one width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_predictor.arithmetic import ceil_div
from attention_predictor.csrc import ops
from attention_predictor.errors import ConfigError, IntegrityError
from attention_predictor.predictor.quantise import LARGEST, SHARES, masks, pack, quantise, unpack
from attention_predictor.predictor.scores import block_peak_and_sum
from attention_predictor.predictor.sequences import put_sequence

# Share of channels whose codes have twice the bits; the same share has no codes, which keeps the mean. In the pocket
# model a share of 1/8 has slightly less error over all layers, but more in the layer that looks up single tokens
# (docs/LOG.md).
WIDE_SHARE = 1 / 4
RECENT_QUERIES = 64  # last queries of each `extend` that count for the channels' importance

CHUNK_GROUPS = 16  # the capacity grows by this many groups: doubling would waste the memory this library saves
# fp32 elements in use at once. On a CPU they should fit in its cache; on a GPU fewer launches matter more.
SCRATCH_ELEMENTS = {"cpu": 1 << 18}
SCRATCH_ELEMENTS_GPU = 1 << 24


@dataclass
class CodedChannels:
    """The channels with codes of one width: their ranks by importance, and the codes."""

    bits: int
    ranks: slice
    codes_BGKJC: Tensor
    mask_P11: Tensor
    factor_P: Tensor


class KeySketch:
    """One layer's keys at `bits` + 28/`group` bits per element; keys of the last partial group are exact.

    It replaces the published calibration, which reads all keys every few steps. At 2 bits, estimates at *every* step
    select better than exact rows every fifth step, and need no transfer. 2.44 bits per element are 15% of bf16 keys, 8%
    of the KV cache.

    `bits` is the mean over channels. A channel's effect on the logits' error grows with its *importance*: the mean
    square of its queries times the mean variance of its keys within a group. As in reverse water-filling, the most
    important quarter of each KV head's channels has codes of twice the bits, and the least important quarter has only
    the group's mean. (At 8 bits all channels have 8: there is nothing left to gain.) The order of channels is fixed
    when a sequence's first whole group is stored. All data is stored in that order, so readers permute the query and
    never the codes.
    """

    def __init__(
        self,
        *,
        batch: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        bits: int = 2,
        group: int = 64,
    ) -> None:
        if bits not in SHARES:
            raise ConfigError(f"bits={bits!r} of a key sketch is not allowed; choose from {sorted(SHARES)}")
        if group < 8 or group % 8:
            raise ConfigError(f"group={group!r} of a key sketch must be a positive multiple of 8 tokens")
        self.bits, self.group, self.length = bits, group, 0
        wide = int(head_dim * WIDE_SHARE) if 2 * bits in SHARES else 0
        coded = head_dim - wide
        # Not in inference mode: inference tensors can't be written to outside of it.
        with torch.inference_mode(False):
            self._coded = []
            for width, ranks in ((2 * bits, slice(0, wide)), (bits, slice(wide, coded))):
                if ranks.stop > ranks.start:
                    shape = (batch, kv_heads, 0, group * width // 8, ranks.stop - ranks.start)
                    codes_BGKJC = torch.zeros(shape, dtype=torch.uint8, device=device)
                    self._coded.append(CodedChannels(width, ranks, codes_BGKJC, *masks(width, device)))
            self._widest = max(channels.ranks.stop - channels.ranks.start for channels in self._coded)
            self._scale_BGKR = torch.zeros(batch, kv_heads, 0, coded, dtype=torch.float16, device=device)
            self._zero_BGKD = torch.zeros(batch, kv_heads, 0, head_dim, dtype=torch.float16, device=device)
            self._tail_BGTD = torch.zeros(batch, kv_heads, group, head_dim, dtype=dtype, device=device)
            # Sum of squared queries, and the channels ordered by falling importance.
            self._square_BGD = torch.zeros(batch, kv_heads, head_dim, device=device)
            self._order_BGD = torch.arange(head_dim, device=device).repeat(batch, kv_heads, 1)

    def tail_start(self, length: int) -> int:
        """First token that a sketch of `length` tokens holds exactly."""
        return length - length % self.group

    @torch.inference_mode(False)
    @torch.no_grad()
    def extend(self, key_BGTD: Tensor, query_BHQD: Tensor, *, kernel: bool = False) -> None:
        """Take the keys of the next T tokens and their queries, as the attention uses them (after RoPE).

        The last queries decide which channels are important. They are read until there is a whole group; only the sum
        of their squares is kept. Query heads of one KV head are adjacent. With `kernel`, on a GPU that has one, a
        kernel quantises the keys in one pass.
        """
        batch, kv_heads, _, head_dim = self._tail_BGTD.shape
        self._check("key_BGTD", key_BGTD, (batch, kv_heads, -1, head_dim))
        self._check("query_BHQD", query_BHQD, (batch, -1, -1, head_dim))
        tokens, filled = key_BGTD.shape[2], self.length % self.group
        taken = min(tokens, self.group - filled)
        if self.length < self.group:
            recent_BGhQD = query_BHQD[:, :, -RECENT_QUERIES:].unflatten(1, (kv_heads, -1))
            self._square_BGD += recent_BGhQD.float().square().sum((2, 3))
        self._tail_BGTD[:, :, filled : filled + taken] = key_BGTD[:, :, :taken]
        if filled + taken == self.group:
            first = self.length // self.group
            end = self.tail_start(self.length + tokens) - self.length  # of the whole groups in key_BGTD
            rest_BGTD = key_BGTD[:, :, taken:end]
            if first == 0:
                importance_BGD = self._square_BGD * (self._variance(self._tail_BGTD) + self._variance(rest_BGTD))
                self._order_BGD = importance_BGD.argsort(dim=-1, descending=True, stable=True)
            self.reserve(self.length + tokens)
            self._store(first, self._tail_BGTD, kernel)
            self._store(first + 1, rest_BGTD, kernel)
            self._tail_BGTD[:, :, : tokens - end] = key_BGTD[:, :, end:]
        self.length += tokens

    @property
    def capacity(self) -> int:
        """Tokens that the tensors can hold without reallocation."""
        return (self._zero_BGKD.shape[2] + 1) * self.group - 1

    @torch.inference_mode(False)
    def reserve(self, tokens: int) -> None:
        """Grow the capacity to at least `tokens`; required before `append`."""
        n_groups, held = tokens // self.group, self._zero_BGKD.shape[2]
        if n_groups <= held:
            return
        wanted = ceil_div(n_groups, CHUNK_GROUPS) * CHUNK_GROUPS
        for owner, name in self._grouped():
            old = getattr(owner, name)
            new = old.new_zeros(*old.shape[:2], wanted, *old.shape[3:])
            new[:, :, :held] = old
            setattr(owner, name, new)

    def advance(self) -> None:
        """Count the token that `append` will take."""
        self.length += 1

    @torch.inference_mode(False)
    @torch.no_grad()
    def append(self, key_BGD: Tensor, query_BHD: Tensor, length_B: Tensor, *, kernel: bool = False) -> None:
        """Take the key and query of one more token, which `advance` has counted; requires capacity (`reserve`).

        With `kernel`, on a GPU that has one, a kernel does this and reads the length on the device; except in the first
        group, which decides the order of the channels.

        `length_B`: int64, tokens of each sequence, this one included.
        """
        if kernel and self.length > self.group and self._why_no_kernel(None) is None:
            if self.length > self.capacity:
                raise ValueError(f"there is room for {self.capacity} tokens, but this would be token {self.length}")
            key_BGD = key_BGD.to(self._tail_BGTD.dtype).contiguous()
            ops.sketch_append(key_BGD, *self._tensors(), self.capacity, length_B)
            return
        self.length -= 1
        self.extend(key_BGD[:, :, None], query_BHD[:, :, None], kernel=kernel)

    @torch.no_grad()
    def logits(self, query_BHD: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
        """Approximate attention logits of one query over all tokens, logits_BHT in fp32.

        `scaling` multiplies the products, then `softcap` bounds them by softcap · tanh(logits / softcap).
        Query heads of one KV head are adjacent. As key ≈ zero + scale · code, zero and scale are applied to the query,
        once per group of tokens, and codes are multiplied unscaled.
        """
        batch, kv_heads, _, head_dim = self._tail_BGTD.shape
        self._check("query_BHD", query_BHD, (batch, -1, head_dim))
        query_BGhD = query_BHD.unflatten(1, (kv_heads, -1)).float() * scaling
        heads, n_groups = query_BGhD.shape[2], self.length // self.group
        ranked_BGhD = query_BGhD.gather(-1, self._order_BGD[:, :, None].expand_as(query_BGhD))
        logits_BGhT = query_BGhD.new_empty(batch, kv_heads, heads, self.length)
        for first, last in self._chunks(n_groups, self._widest):
            zero_BGKD = self._zero_BGKD[:, :, first:last].float()
            offset_BGhK = ranked_BGhD @ zero_BGKD.transpose(-1, -2)
            part_BGKhT = offset_BGhK.transpose(2, 3)[..., None]
            for channels in self._coded:
                scale_BGK1C = self._scale_BGKR[:, :, first:last, None, channels.ranks].float()
                code_BGKTC = unpack(channels.codes_BGKJC[:, :, first:last], channels.mask_P11)
                query_BG1hC = ranked_BGhD[:, :, None, :, channels.ranks]
                product_BGKhT = (query_BG1hC * scale_BGK1C) @ code_BGKTC.transpose(-1, -2)
                product_BGKhT.unflatten(-1, (len(channels.factor_P), -1)).mul_(channels.factor_P[:, None])
                part_BGKhT = product_BGKhT.add_(part_BGKhT)  # starts as the zeros' contribution, one number per group
            block_BGhT = logits_BGhT[..., first * self.group : last * self.group]
            block_BGhT.unflatten(-1, (last - first, self.group)).copy_(part_BGKhT.transpose(2, 3))
        exact_BGTD = self._tail_BGTD[:, :, : self.length % self.group].float()
        logits_BGhT[..., n_groups * self.group :] = query_BGhD @ exact_BGTD.transpose(-1, -2)
        if softcap is not None:
            logits_BGhT.div_(softcap).tanh_().mul_(softcap)
        return logits_BGhT.flatten(1, 2)

    @torch.no_grad()
    def block_scores(
        self,
        query_BHD: Tensor,
        scaling: float,
        softcap: float | None = None,
        *,
        block_size: int,
        real_BL: Tensor | None = None,
        kernel: bool = False,
        capacity: int | None = None,
        length_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Largest logit and log-sum-exp of each block's tokens, peak_BHC and sum_BHC in fp32.

        `real_BL` is False at padding; a block of padding only gets ``-inf``. With `kernel`, if there is one
        (`why_no_kernel`), a kernel does this in one pass without storing the logits.

        Args:
            capacity: C, blocks of the result; `None`: those of the sequence. Blocks without tokens get ``-inf``, or
                undefined numbers from a kernel.
            length_B: int64 on the device, tokens of each sequence, required with `capacity`. Without a kernel the
                host's `length` is used, so the step can't be captured.
        """
        if kernel and self.why_no_kernel(block_size) is None:
            return ops.sketch_scores(
                query_BHD.to(self._tail_BGTD.dtype).contiguous(),
                *self._tensors(),
                self.length if capacity is None else capacity * block_size,
                length_B,
                None if real_BL is None else real_BL.contiguous(),
                block_size,
                scaling,
                softcap or 0.0,
            )
        logits_BHT = self.logits(query_BHD, scaling, softcap)
        if real_BL is not None:
            logits_BHT = logits_BHT.masked_fill(~real_BL[:, None, : self.length], float("-inf"))
        peak_BHN, sum_BHN = block_peak_and_sum(logits_BHT, block_size)
        more = 0 if capacity is None else capacity - peak_BHN.shape[-1]
        return F.pad(peak_BHN, (0, more), value=-torch.inf), F.pad(sum_BHN, (0, more), value=-torch.inf)

    def why_no_kernel(self, block_size: int) -> str | None:
        """Why no kernel supports this sketch with blocks of that size, on one line; ``None`` if one does."""
        return self._why_no_kernel(block_size)

    @torch.inference_mode(False)
    @torch.no_grad()
    def crop(self, length: int, tail_key_BGTD: Tensor | None = None) -> None:
        """Forget the tokens from `length` on.

        If no whole group is left, the next one decides the order of the channels again, from all queries read until
        then; at length 0 these are forgotten too.

        `tail_key_BGTD` are the exact keys of tokens `tail_start(length)` to `length` − 1, which exist only as codes.
        It may be None if there are no such tokens, or if they are still in the exact tail.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length must lie within 0..{self.length}, got {length}")
        tokens = length % self.group
        if tail_key_BGTD is not None:
            batch, kv_heads, _, head_dim = self._tail_BGTD.shape
            self._check("tail_key_BGTD", tail_key_BGTD, (batch, kv_heads, tokens, head_dim))
            self._tail_BGTD[:, :, :tokens] = tail_key_BGTD
        elif tokens and length < self.tail_start(self.length):
            raise ValueError(f"tail_key_BGTD is needed to crop {self.length} tokens to {length}")
        if length == 0:
            self._square_BGD.zero_()
        self.length = length

    @torch.no_grad()
    def dequantise(self) -> Tensor:
        """All keys as decoded from the sketch, key_BGTD in the keys' dtype: to measure its error."""
        batch, kv_heads, _, head_dim = self._tail_BGTD.shape
        key_BGTD = self._tail_BGTD.new_empty(batch, kv_heads, self.length, head_dim)
        rank_BGD = self._order_BGD.argsort(-1)
        for first, last in self._chunks(self.length // self.group, head_dim):
            zero_BGK1D = self._zero_BGKD[:, :, first:last, None].float()
            restored_BGKTD = zero_BGK1D.repeat(1, 1, 1, self.group, 1)
            for channels in self._coded:
                scale_BGK1C = self._scale_BGKR[:, :, first:last, None, channels.ranks].float()
                code_BGKTC = unpack(channels.codes_BGKJC[:, :, first:last], channels.mask_P11)
                code_BGKTC.unflatten(-2, (len(channels.factor_P), -1)).mul_(channels.factor_P[:, None, None])
                restored_BGKTD[..., channels.ranks] += scale_BGK1C * code_BGKTC
            restored_BGTD = restored_BGKTD.flatten(2, 3)
            restored_BGTD = restored_BGTD.gather(-1, rank_BGD[:, :, None].expand_as(restored_BGTD))
            key_BGTD[:, :, first * self.group : last * self.group] = restored_BGTD
        tail = self.length % self.group
        key_BGTD[:, :, self.length - tail :] = self._tail_BGTD[:, :, :tail]
        return key_BGTD

    @torch.inference_mode(False)
    @torch.no_grad()
    def index(self, batch_index: Tensor) -> None:
        """Keep the sequences `batch_index` [new B], in that order (beams, expanded or filtered batches)."""
        for owner, name in self._held():
            tensor = getattr(owner, name)
            setattr(owner, name, tensor.index_select(0, batch_index.to(tensor.device)))

    @torch.no_grad()
    def put(self, place: int, other: KeySketch) -> None:
        """Make sequence ``place`` what the only sequence of ``other`` is, in place."""
        for (mine, name), (theirs, _) in zip(self._held(), other._held(), strict=True):
            put_sequence(getattr(mine, name), place, getattr(theirs, name))
        self.length = max(self.length, other.length)

    @property
    def nbytes(self) -> int:
        """Device memory held, spare storage included."""
        return sum(getattr(owner, name).nbytes for owner, name in self._held())

    def check_integrity(self) -> None:
        """Raise IntegrityError if storage and length disagree, or if a stored number is invalid."""
        n_groups, tail = divmod(self.length, self.group)
        room = {getattr(owner, name).shape[2] for owner, name in self._grouped()}
        if len(room) != 1 or min(room) < n_groups:
            raise IntegrityError(f"sketch of {self.length} tokens has room for {sorted(room)} groups")
        for name, tensor in (("scale", self._scale_BGKR), ("zero", self._zero_BGKD)):
            if not torch.isfinite(tensor[:, :, :n_groups]).all():
                raise IntegrityError(f"sketch {name} holds NaN or infinity")
        if (self._scale_BGKR[:, :, :n_groups] < 0).any():
            raise IntegrityError("sketch scale holds negative numbers")
        sorted_BGD = self._order_BGD.sort(-1).values
        if (sorted_BGD != torch.arange(sorted_BGD.shape[2], device=sorted_BGD.device)).any():
            raise IntegrityError("the sketch's order of channels is not a permutation")
        if not torch.isfinite(self._tail_BGTD[:, :, :tail]).all():
            raise IntegrityError("exact keys of the sketch hold NaN or infinity")

    def _why_no_kernel(self, block_size: int | None) -> str | None:
        tail_BGTD = self._tail_BGTD
        return ops.why_no_sketch_kernel(tail_BGTD.device, tail_BGTD.dtype, tail_BGTD.shape[3], self.group, block_size)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """The sketch's tensors, in the order of the kernels' arguments."""
        *wide, narrow = (channels.codes_BGKJC for channels in self._coded)
        exact_and_coded = (self._order_BGD, self._tail_BGTD, self._zero_BGKD, self._scale_BGKR)
        return *exact_and_coded, wide[0] if wide else None, narrow

    def _grouped(self) -> list[tuple[object, str]]:
        """Owner and name of the tensors that grow with the groups."""
        return [(self, "_scale_BGKR"), (self, "_zero_BGKD"), *((channels, "codes_BGKJC") for channels in self._coded)]

    def _held(self) -> list[tuple[object, str]]:
        """Owner and name of all tensors; their first dimension is sequences."""
        return [*self._grouped(), (self, "_tail_BGTD"), (self, "_square_BGD"), (self, "_order_BGD")]

    def _chunks(self, n_groups: int, channels: int) -> list[tuple[int, int]]:
        """Ranges of groups whose `channels` fp32 numbers per token fit the scratch limit."""
        batch, kv_heads = self._tail_BGTD.shape[:2]
        limit = SCRATCH_ELEMENTS.get(self._tail_BGTD.device.type, SCRATCH_ELEMENTS_GPU)
        step = max(1, limit // max(1, batch * kv_heads * self.group * channels))
        return [(first, min(first + step, n_groups)) for first in range(0, n_groups, step)]

    def _variance(self, key_BGTD: Tensor) -> Tensor:
        """Each channel's variance within groups, summed over whole groups of keys; fp32 [B, G, D]."""
        variance_BGD = torch.zeros_like(self._square_BGD)
        for low, high in self._chunks(key_BGTD.shape[2] // self.group, 2 * key_BGTD.shape[3]):
            part_BGKTD = key_BGTD[:, :, low * self.group : high * self.group].unflatten(2, (-1, self.group))
            variance_BGD += part_BGKTD.float().var(3, correction=0).sum(2)
        return variance_BGD

    def _store(self, first: int, key_BGTD: Tensor, kernel: bool) -> None:
        """Quantise and store whole groups of keys, from group `first` on."""
        if kernel and self._why_no_kernel(None) is None:
            ops.sketch_store(key_BGTD.to(self._tail_BGTD.dtype), *self._tensors(), first)
            return
        for low, high in self._chunks(key_BGTD.shape[2] // self.group, 8 * self._widest):  # copies in quantise
            groups = slice(first + low, first + high)
            part_BGTD = key_BGTD[:, :, low * self.group : high * self.group]
            part_BGTD = part_BGTD.gather(-1, self._order_BGD[:, :, None].expand_as(part_BGTD))
            part_BGKTD = part_BGTD.unflatten(2, (-1, self.group))
            for channels in self._coded:
                code_BGKTC, scale_BGKC, zero_BGKC = quantise(part_BGKTD[..., channels.ranks], channels.bits)
                channels.codes_BGKJC[:, :, groups] = pack(code_BGKTC, channels.bits)
                self._scale_BGKR[:, :, groups, channels.ranks] = scale_BGKC
                self._zero_BGKD[:, :, groups, channels.ranks] = zero_BGKC
            coded = self._scale_BGKR.shape[3]
            mean_BGKC = part_BGKTD[..., coded:].float().clamp(-LARGEST, LARGEST).mean(3)
            self._zero_BGKD[:, :, groups, coded:] = mean_BGKC

    @staticmethod
    def _check(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
        """Shapes must agree; −1 stands for any size."""
        shape = tuple(tensor.shape)
        if len(shape) != len(expected) or any(e not in (-1, s) for s, e in zip(shape, expected, strict=True)):
            raise ValueError(f"{name} has shape {list(shape)}, expected {list(expected)} (-1: any)")
