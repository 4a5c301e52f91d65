"""KeySketch: a few-bit copy of every key, small enough to stay on the device and be read every step.

Suffixes: B sequences, G KV heads, H query heads, h query heads of one KV head, T tokens, K groups of
tokens, J bytes of a group (several tokens each), D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_predictor.predictor.errors import ConfigError, IntegrityError
from attention_predictor.predictor.quantise import SHARES, masks, pack, quantise, unpack

CHUNK_GROUPS = 16  # storage grows by this many groups: doubling would waste the memory this library saves
# Elements of fp32 in use at once. On a CPU they should stay in its cache; on a GPU few launches matter.
SCRATCH_ELEMENTS = {"cpu": 1 << 18}
SCRATCH_ELEMENTS_GPU = 1 << 24


class KeySketch:
    """One layer's keys in `bits` + 32/`group` bits an element; those of the last partial group are exact.

    It replaces the published calibration, which reads all keys every few steps: at 2 bits a row computed
    from it *every* step selects better than exact rows every fifth step, and needs no transfer.
    2.5 bits an element is 16% of bf16 keys, 8% of the KV cache.
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
        # Not under inference mode: what is made there could not be updated outside of it later.
        with torch.inference_mode(False):
            shape = (batch, kv_heads, 0, head_dim)
            codes_shape = (batch, kv_heads, 0, group * bits // 8, head_dim)
            self._codes_BGKJD = torch.zeros(codes_shape, dtype=torch.uint8, device=device)
            self._scale_BGKD = torch.zeros(shape, dtype=torch.float16, device=device)
            self._zero_BGKD = torch.zeros(shape, dtype=torch.float16, device=device)
            self._tail_BGTD = torch.zeros(batch, kv_heads, group, head_dim, dtype=dtype, device=device)
            self._mask_P11, self._factor_P = masks(bits, device)

    def tail_start(self, length: int) -> int:
        """First token that a sketch of `length` tokens holds exactly."""
        return length - length % self.group

    @torch.inference_mode(False)
    @torch.no_grad()
    def extend(self, key_BGTD: Tensor) -> None:
        """Take the keys of the next T tokens, as the attention uses them (after RoPE)."""
        self._check("key_BGTD", key_BGTD, (*self._tail_BGTD.shape[:2], -1, self._tail_BGTD.shape[3]))
        tokens, filled = key_BGTD.shape[2], self.length % self.group
        taken = min(tokens, self.group - filled)
        self._tail_BGTD[:, :, filled : filled + taken] = key_BGTD[:, :, :taken]
        if filled + taken == self.group:
            first = self.length // self.group
            end = self.tail_start(self.length + tokens) - self.length  # of the whole groups in key_BGTD
            self._grow(first + 1 + (end - taken) // self.group)
            self._store(first, self._tail_BGTD)
            self._store(first + 1, key_BGTD[:, :, taken:end])
            self._tail_BGTD[:, :, : tokens - end] = key_BGTD[:, :, end:]
        self.length += tokens

    @torch.no_grad()
    def logits(self, query_BHD: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
        """Approximate attention logits of one query over all tokens, logits_BHT in fp32.

        `scaling` multiplies the products, then `softcap` bounds them by softcap · tanh(logits / softcap).
        Query heads that share a KV head lie side by side. As key ≈ zero + scale · code, zero and scale are
        folded into the query, once a group of tokens, and codes are multiplied as they are.
        """
        batch, kv_heads, _, head_dim = self._tail_BGTD.shape
        self._check("query_BHD", query_BHD, (batch, -1, head_dim))
        query_BGhD = query_BHD.unflatten(1, (kv_heads, -1)).float() * scaling
        heads, n_groups = query_BGhD.shape[2], self.length // self.group
        logits_BGhT = query_BGhD.new_empty(batch, kv_heads, heads, self.length)
        for first, last in self._chunks(n_groups):
            scale_BGK1D = self._scale_BGKD[:, :, first:last, None].float()
            zero_BGKD = self._zero_BGKD[:, :, first:last].float()
            code_BGKTD = unpack(self._codes_BGKJD[:, :, first:last], self._mask_P11)
            product_BGKhT = (query_BGhD[:, :, None] * scale_BGK1D) @ code_BGKTD.transpose(-1, -2)
            product_BGKhT.unflatten(-1, (len(self._factor_P), -1)).mul_(self._factor_P[:, None])
            offset_BGhK = query_BGhD @ zero_BGKD.transpose(-1, -2)
            part_BGhT = logits_BGhT[..., first * self.group : last * self.group]
            part_BGhKT = part_BGhT.unflatten(-1, (last - first, self.group))
            torch.add(product_BGKhT.transpose(2, 3), offset_BGhK[..., None], out=part_BGhKT)
        exact_BGTD = self._tail_BGTD[:, :, : self.length % self.group].float()
        logits_BGhT[..., n_groups * self.group :] = query_BGhD @ exact_BGTD.transpose(-1, -2)
        if softcap is not None:
            logits_BGhT.div_(softcap).tanh_().mul_(softcap)
        return logits_BGhT.flatten(1, 2)

    @torch.inference_mode(False)
    @torch.no_grad()
    def crop(self, length: int, tail_key_BGTD: Tensor | None = None) -> None:
        """Forget the tokens from `length` on.

        `tail_key_BGTD` are the exact keys of tokens `tail_start(length)` to `length` − 1, of which only
        codes are left; without any such token, or while they are still in the exact tail, it may be None.
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
        self.length = length

    @torch.no_grad()
    def dequantise(self) -> Tensor:
        """All keys as the sketch knows them, key_BGTD in the keys' dtype: to measure its error."""
        batch, kv_heads, _, head_dim = self._tail_BGTD.shape
        key_BGTD = self._tail_BGTD.new_empty(batch, kv_heads, self.length, head_dim)
        for first, last in self._chunks(self.length // self.group):
            code_BGKTD = unpack(self._codes_BGKJD[:, :, first:last], self._mask_P11)
            code_BGKTD.unflatten(-2, (len(self._factor_P), -1)).mul_(self._factor_P[:, None, None])
            scale_BGK1D = self._scale_BGKD[:, :, first:last, None].float()
            restored_BGKTD = self._zero_BGKD[:, :, first:last, None].float() + scale_BGK1D * code_BGKTD
            key_BGTD[:, :, first * self.group : last * self.group] = restored_BGKTD.flatten(2, 3)
        tail = self.length % self.group
        key_BGTD[:, :, self.length - tail :] = self._tail_BGTD[:, :, :tail]
        return key_BGTD

    @torch.inference_mode(False)
    @torch.no_grad()
    def index(self, batch_index: Tensor) -> None:
        """Keep the sequences `batch_index` [new B], in that order (beams, expanded or filtered batches)."""
        for name in ("_codes_BGKJD", "_scale_BGKD", "_zero_BGKD", "_tail_BGTD"):
            tensor = getattr(self, name)
            setattr(self, name, tensor.index_select(0, batch_index.to(tensor.device)))

    @property
    def nbytes(self) -> int:
        """Device memory held, spare storage included."""
        held = (self._codes_BGKJD, self._scale_BGKD, self._zero_BGKD, self._tail_BGTD)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def check_integrity(self) -> None:
        """Raise IntegrityError if storage and length disagree or a number that is read isn't finite."""
        n_groups, tail = divmod(self.length, self.group)
        room = {t.shape[2] for t in (self._codes_BGKJD, self._scale_BGKD, self._zero_BGKD)}
        if len(room) != 1 or min(room) < n_groups:
            raise IntegrityError(f"sketch of {self.length} tokens has room for {sorted(room)} groups")
        for name, tensor in (("scale", self._scale_BGKD), ("zero", self._zero_BGKD)):
            if not torch.isfinite(tensor[:, :, :n_groups]).all():
                raise IntegrityError(f"sketch {name} holds NaN or infinity")
        if (self._scale_BGKD[:, :, :n_groups] < 0).any():
            raise IntegrityError("sketch scale holds negative numbers")
        if not torch.isfinite(self._tail_BGTD[:, :, :tail]).all():
            raise IntegrityError("exact keys of the sketch hold NaN or infinity")

    def _chunks(self, n_groups: int, copies: int = 1) -> list[tuple[int, int]]:
        """Ranges of groups of which `copies` unpacked copies fit the scratch limit."""
        batch, kv_heads, _, head_dim = self._tail_BGTD.shape
        limit = SCRATCH_ELEMENTS.get(self._tail_BGTD.device.type, SCRATCH_ELEMENTS_GPU)
        step = max(1, limit // max(1, copies * batch * kv_heads * self.group * head_dim))
        return [(first, min(first + step, n_groups)) for first in range(0, n_groups, step)]

    def _store(self, first: int, key_BGTD: Tensor) -> None:
        """Write whole groups of keys as codes from group `first` on."""
        for low, high in self._chunks(key_BGTD.shape[2] // self.group, copies=8):  # that many quantise makes
            part_BGKTD = key_BGTD[:, :, low * self.group : high * self.group].unflatten(2, (-1, self.group))
            code_BGKTD, scale_BGKD, zero_BGKD = quantise(part_BGKTD, self.bits)
            self._codes_BGKJD[:, :, first + low : first + high] = pack(code_BGKTD, self.bits)
            self._scale_BGKD[:, :, first + low : first + high] = scale_BGKD
            self._zero_BGKD[:, :, first + low : first + high] = zero_BGKD

    def _grow(self, n_groups: int) -> None:
        capacity = self._codes_BGKJD.shape[2]
        if n_groups <= capacity:
            return
        wanted = -(-n_groups // CHUNK_GROUPS) * CHUNK_GROUPS
        for name in ("_codes_BGKJD", "_scale_BGKD", "_zero_BGKD"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], wanted, *old.shape[3:])
            new[:, :, :capacity] = old
            setattr(self, name, new)

    @staticmethod
    def _check(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
        """Shapes must agree; −1 stands for any size."""
        shape = tuple(tensor.shape)
        if len(shape) != len(expected) or any(e not in (-1, s) for s, e in zip(shape, expected, strict=True)):
            raise ValueError(f"{name} has shape {list(shape)}, expected {list(expected)} (-1: any)")
