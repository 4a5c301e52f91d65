"""BlockCodec: how a block lies in host memory, as it is or as codes of 8 or 4 bits.

Suffixes: B sequences, G KV heads, N blocks, T tokens of a block, D head size; ``x`` any dimensions before, ``z`` those
of a stored block; 2 is keys then values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_predictor.csrc import binding, block_code, ops


class BlockCodec:
    """Stores blocks as they are.

    Attributes:
        shape: Of a stored block.
        stored: Its dtype.
    """

    def __init__(self, block_size: int, head_dim: int, dtype: torch.dtype) -> None:
        self.block_size, self.head_dim, self.dtype = block_size, head_dim, dtype
        self.shape: tuple[int, ...] = (2, block_size, head_dim)
        self.stored = dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of a stored block, keys and values of one KV head."""
        return stored_bytes(None, self.block_size, self.head_dim, self.dtype.itemsize)

    def encode(self, key_BGNTD: Tensor, value_BGNTD: Tensor) -> Tensor:
        """Whole blocks as they are stored, ``[B, G, N, z]``, on the same device."""
        return torch.stack((key_BGNTD, value_BGNTD), dim=-3)

    def decode(self, stored_xz: Tensor) -> Tensor:
        """kv_x2TD of stored blocks, on the same device."""
        return stored_xz


class CodedBlocks(BlockCodec):
    """Stores blocks as codes (``csrc/block_code.py``). A block always has the same codes, on every device."""

    def __init__(self, block_size: int, head_dim: int, dtype: torch.dtype, *, bits: int, kernel: bool = True) -> None:
        """``kernel``: whether a GPU's kernel may code blocks."""
        super().__init__(block_size, head_dim, dtype)
        self.bits, self.kernel = bits, kernel
        self.shape, self.stored = (self.block_bytes,), torch.uint8

    @property
    def block_bytes(self) -> int:
        return stored_bytes(self.bits, self.block_size, self.head_dim, self.dtype.itemsize)

    def encode(self, key_BGNTD: Tensor, value_BGNTD: Tensor) -> Tensor:
        device = key_BGNTD.device
        if self.kernel and self.dtype in ops.ELEMENTS and binding.on_gpu(device) and ops.why_no_kernels(device) is None:
            key_BGLD, value_BGLD = key_BGNTD.flatten(2, 3), value_BGNTD.flatten(2, 3)
            return ops.encode_blocks(key_BGLD, value_BGLD, self.block_size, self.bits)
        return block_code.encode_reference(key_BGNTD, value_BGNTD, self.bits)

    def decode(self, stored_xz: Tensor) -> Tensor:
        return block_code.decode_reference(stored_xz, self.block_size, self.head_dim, self.bits, self.dtype)


def stored_bytes(bits: int | None, block_size: int, head_dim: int, itemsize: int) -> int:
    """Bytes of a block of one KV head in host memory; ``bits``: of its codes, ``None``: it is not coded."""
    if bits is None:
        return 2 * block_size * head_dim * itemsize
    return block_code.block_bytes(block_size, head_dim, bits)
