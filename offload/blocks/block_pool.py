"""BlockPool: the resident blocks of one layer in device memory, a fixed number of slots per row.

Suffixes: B sequences, G KV heads, R = B·G rows (row = b*G + g), S slots, T tokens in a block, D head size, n list
entries; 2 is keys then values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from attention_predictor.errors import IntegrityError
from attention_predictor.predictor.sequences import put_sequence


class BlockPool:
    """Keys and values of the resident blocks of one layer.

    `key_BGSTD` and `value_BGSTD` are contiguous, so attention reads them as [B, G, S*T, D] without a copy. `SlotTable`
    knows which block a slot holds. Before `grow` and `index`, which replace both tensors, wait for outstanding fetches.
    """

    def __init__(
        self,
        *,
        batch: int,
        kv_heads: int,
        slots: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        # Zeros, because values of masked slots are multiplied by zero, and 0 · NaN is NaN.
        # Not in inference mode: inference tensors can't be written to outside of it.
        with torch.inference_mode(False):
            self.key_BGSTD = torch.zeros((batch, kv_heads, slots, block_size, head_dim), dtype=dtype, device=device)
            self.value_BGSTD = torch.zeros_like(self.key_BGSTD)

    @property
    def slots(self) -> int:
        """Slots per row."""
        return self.key_BGSTD.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self.key_BGSTD.nbytes + self.value_BGSTD.nbytes

    @torch.no_grad()
    def write_blocks(self, row_n: Tensor, slot_n: Tensor, kv_n2TD: Tensor) -> None:
        """Writes block i of kv [n, 2, block_size, D] to slot `slot_n[i]` of row `row_n[i]`. Tensors on any device.

        A pinned `kv_n2TD` is copied asynchronously: keep it unchanged until this device's current stream is done.
        Raises ValueError for a wrong shape or dtype, IndexError for a slot that does not exist.
        """
        expected = (row_n.numel(), 2, *self.key_BGSTD.shape[3:])
        self._check("kv", kv_n2TD, expected)
        index_n = self._flat_slots(row_n, slot_n)
        kv_n2TD = kv_n2TD.to(self.key_BGSTD.device, non_blocking=True)
        self.key_BGSTD.flatten(0, 2).index_copy_(0, index_n, kv_n2TD[:, 0])
        self.value_BGSTD.flatten(0, 2).index_copy_(0, index_n, kv_n2TD[:, 1])

    @torch.no_grad()
    def write_token(self, slot_R: Tensor, offset_R: Tensor, key_BG1D: Tensor, value_BG1D: Tensor) -> None:
        """Writes one new token of every row at `offset_R` (tokens) in the slot that holds the row's tail block.

        Raises ValueError for a wrong shape or dtype, IndexError for a slot that does not exist.
        """
        batch, kv_heads, _, block_size, head_dim = self.key_BGSTD.shape
        self._check("key", key_BG1D, (batch, kv_heads, 1, head_dim))
        self._check("value", value_BG1D, (batch, kv_heads, 1, head_dim))
        row_R = torch.arange(batch * kv_heads, device=slot_R.device)
        index_R = self._flat_slots(row_R, slot_R) * block_size + offset_R
        self.key_BGSTD.flatten(0, 3).index_copy_(0, index_R, key_BG1D.flatten(0, 2))
        self.value_BGSTD.flatten(0, 3).index_copy_(0, index_R, value_BG1D.flatten(0, 2))

    def grow(self, slots: int) -> None:
        """Adds empty slots, keeping contents. Used only while the context is shorter than the budget."""
        if slots < self.slots:
            raise ValueError(f"slots must be at least {self.slots}, got {slots}")
        self._replace(lambda kv_BGSTD: pad(kv_BGSTD, (0, 0, 0, 0, 0, slots - self.slots)))

    def index(self, batch_index: Tensor) -> None:
        """Reorders, repeats or selects sequences: sequence i becomes the former sequence `batch_index[i]` (beams)."""
        batch_index = batch_index.to(self.key_BGSTD.device)
        self._replace(lambda kv_BGSTD: kv_BGSTD.index_select(0, batch_index))

    def put(self, place: int, other: BlockPool) -> None:
        """Makes sequence `place` what the only sequence of `other` is, in place."""
        put_sequence(self.key_BGSTD, place, other.key_BGSTD)
        put_sequence(self.value_BGSTD, place, other.value_BGSTD)

    def check_integrity(self) -> None:
        """Raises IntegrityError, naming what was found, unless keys and values have the same valid form."""
        key, value = self.key_BGSTD, self.value_BGSTD
        for what in ("shape", "dtype", "device"):
            if getattr(key, what) != getattr(value, what):
                raise IntegrityError(f"{what} of keys is {getattr(key, what)}, of values {getattr(value, what)}")
        if key.dim() != 5 or not (key.is_contiguous() and value.is_contiguous()):
            raise IntegrityError(f"expected contiguous [B, G, S, T, D], found strides {key.stride()}, {value.stride()}")
        if key.nbytes and key.data_ptr() == value.data_ptr():
            raise IntegrityError("keys and values share their memory")

    def _replace(self, change: Callable[[Tensor], Tensor]) -> None:
        # Both are computed before either is replaced, so running out of device memory leaves the pool unchanged.
        with torch.inference_mode(False), torch.no_grad():
            self.key_BGSTD, self.value_BGSTD = change(self.key_BGSTD), change(self.value_BGSTD)

    def _check(self, name: str, kv: Tensor, expected: tuple[int, ...]) -> None:
        dtype = self.key_BGSTD.dtype
        if kv.shape != expected or kv.dtype != dtype:
            found = f"{kv.dtype} {list(kv.shape)}"
            raise ValueError(f"size mismatch for {name}: expected {dtype} {list(expected)}, got {found}")

    def _flat_slots(self, row_n: Tensor, slot_n: Tensor) -> Tensor:
        """Slot numbers counted over all rows, on the pool's device."""
        if row_n.shape != slot_n.shape:
            raise ValueError(f"size mismatch for slot: expected {list(row_n.shape)}, got {list(slot_n.shape)}")
        rows = self.key_BGSTD.shape[0] * self.key_BGSTD.shape[1]
        for name, number_n, count in (("row", row_n, rows), ("slot", slot_n, self.slots)):
            # A number out of range would address another row. Device tensors are not checked: that would synchronise.
            if number_n.device.type != "cpu" or not number_n.numel():
                continue
            low, high = (int(end) for end in number_n.aminmax())
            if low < 0 or high >= count:
                raise IndexError(f"{name} must be between 0 and {count - 1}, got {low} to {high}")
        return (row_n * self.slots + slot_n).to(self.key_BGSTD.device, non_blocking=True)
