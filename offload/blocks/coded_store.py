"""CodedStore: a ``HostStore`` whose complete blocks are codes; the block still being written is kept as it is.

Suffixes: as in ``host_store.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attention_predictor.arithmetic import ceil_div
from attention_predictor.errors import IntegrityError
from attention_predictor.offload.blocks.block_codec import CodedBlocks
from attention_predictor.offload.blocks.host_store import HostStore


class CodedStore(HostStore):
    """Append-only keys and values of one layer. What is read back of a complete block is what its codes decode to.

    A block is coded when its last token arrives: on the device that brings it, so that codes cross the bus. Until then
    its tokens are in the *open block*. Cropping into a complete block opens it again, with what its codes decode to.

    Attributes:
        codec: Of the complete blocks.
        open_BG2TD: The open block, pinned like the slabs; zeros beyond its last token. Its contents mean nothing while
            no block is open.
    """

    codec: CodedBlocks

    def __init__(self, *, bits: int, **options: Any) -> None:
        """``bits``: of a code. ``options``: as of ``HostStore``."""
        super().__init__(**options)
        self.codec = CodedBlocks(self.block_size, self.head_dim, self.dtype, bits=bits, kernel=self.kernel)
        self.open_BG2TD = self._new_open_block(self.batch)
        self._replaced_BG2TD: Tensor | None = None  # tokens of the open block that the running `append` may overwrite

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.open_BG2TD.nbytes

    @property
    def open_block(self) -> int | None:
        """Number of the block that holds some tokens and isn't complete, or ``None``."""
        block, offset = divmod(self.length, self.block_size)
        return block if offset else None

    @property
    def open_R2TD(self) -> Tensor:
        """The open block by rows."""
        return self.open_BG2TD.flatten(0, 1)

    def append(self, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        self._replaced_BG2TD = None
        super().append(key_BGTD, value_BGTD)
        self._replaced_BG2TD = None

    def settle(self, stop: int | None = None) -> None:
        # A token that was in the open block arrives once more, as part of the whole block.
        super().settle(None if stop is None else ceil_div(stop, self.block_size) * self.block_size)

    def fetch(self, row_n: Tensor, block_n: Tensor, device: torch.device) -> Tensor:
        code_nz = torch.empty((row_n.numel(), *self.codec.shape), dtype=self.codec.stored)
        code_nz = self.gather_stored(row_n, block_n, code_nz).to(device, non_blocking=True)
        kv_n2TD = self.codec.decode(code_nz)
        if self.open_block is not None:
            open_n = (block_n == self.open_block).nonzero()[:, 0]
            kv_n2TD.index_copy_(0, open_n.to(device), self.open_R2TD[row_n[open_n]].to(device))
        return kv_n2TD

    def truncate(self, length: int) -> None:
        self._check_crop(length)
        self.settle()
        (block, offset), opened_BG2TD = divmod(length, self.block_size), self.open_BG2TD
        if offset and block != self.open_block:
            number, place = divmod(block, self.slab_blocks)
            opened_BG2TD = self.codec.decode(torch.stack([slabs[number][:, place] for slabs in self._slabs]))
        super().truncate(length)
        if opened_BG2TD is not self.open_BG2TD:
            self.open_BG2TD.copy_(opened_BG2TD)
            self._clear_tail()

    def index(self, batch_index: Tensor) -> None:
        self.settle()
        batch_index = batch_index.cpu()
        if batch_index.numel() == self.batch:
            self.open_BG2TD.copy_(self.open_BG2TD.index_select(0, batch_index))
        else:
            self.open_BG2TD = self._new_open_block(batch_index.numel()).copy_(self.open_BG2TD[batch_index])
        super().index(batch_index)

    def put(self, place: int, other: HostStore) -> None:
        assert isinstance(other, CodedStore)
        super().put(place, other)
        self.open_BG2TD[place].copy_(other.open_BG2TD[0])

    def check_integrity(self) -> None:
        super().check_integrity()
        found, expected = self.open_BG2TD, (self.batch, self.kv_heads, 2, self.block_size, self.head_dim)
        if found.shape != expected or found.dtype != self.dtype or not found.is_contiguous():
            raise IntegrityError(f"open block: expected {self.dtype} {expected}, found {found.dtype} {found.shape}")

    def __deepcopy__(self, memo: dict[int, Any]) -> CodedStore:
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, CodedStore)
        twin.open_BG2TD = self._new_open_block(self.batch).copy_(self.open_BG2TD)
        return twin

    def _fill(self, out_n2TD: Tensor, row_n: Tensor, block_n: Tensor) -> None:
        out_n2TD.copy_(self.fetch(row_n, block_n, out_n2TD.device))

    def _new_open_block(self, batch: int) -> Tensor:
        return self._lend((batch, self.kv_heads, 2, self.block_size, self.head_dim), self.dtype)

    def _partial(self, b: int, block: int) -> Tensor:
        return self.open_BG2TD[b]

    def _runs(self, key_BGTD: Tensor, value_BGTD: Tensor) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """As of ``HostStore``. New tokens that complete the open block come with its tokens, as a whole block."""
        offset, device = self.length % self.block_size, key_BGTD.device
        if not offset or offset + key_BGTD.shape[2] < self.block_size:
            yield from super()._runs(key_BGTD, value_BGTD)
            return
        self.settle()
        self._replaced_BG2TD = self.open_BG2TD[:, :, :, :offset].clone()
        key_BGTD, value_BGTD = (
            torch.cat([old_BGTD.to(device), new_BGTD], 2)
            for old_BGTD, new_BGTD in zip(self._replaced_BG2TD.unbind(2), (key_BGTD, value_BGTD), strict=True)
        )
        yield from self._runs_from(self.length - offset, key_BGTD, value_BGTD)

    def _undo(self, length: int, slabs: list[int], copier: Any) -> None:
        super()._undo(length, slabs, copier)
        if self._replaced_BG2TD is not None:
            offset = length % self.block_size
            self.open_BG2TD[:, :, :, :offset] = self._replaced_BG2TD
            self.open_BG2TD[:, :, :, offset:] = 0

    def _add_open_block(self, kv_2BGnTD: Tensor, first: int) -> None:
        block = self.open_block
        if block is not None and first <= block < first + kv_2BGnTD.shape[3]:
            kv_2BGnTD[:, :, :, block - first].copy_(self.open_BG2TD.movedim(2, 0), non_blocking=True)

    def _unpack(self, raw_SBGnz: Tensor, into_2BGSnTD: Tensor) -> None:
        for number, raw_BGnz in enumerate(raw_SBGnz):  # one by one: decoding takes several times a slab's memory
            into_2BGSnTD[:, :, :, number].copy_(self.codec.decode(raw_BGnz).movedim(3, 0))


def new_store(bits: int | None, **options: Any) -> HostStore:
    """A store of blocks with codes of so many bits, or as they are; ``options``: as of ``HostStore``."""
    return HostStore(**options) if bits is None else CodedStore(bits=bits, **options)
