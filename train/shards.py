"""Encoding of a recording's parquet shards: records to table rows, and back to tensors.

Suffixes: Q steps, N blocks, X records (sequences × layers × KV heads).
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attention_predictor.arithmetic import ceil_div
from attention_predictor.errors import DataError

LARGEST = 1.01  # fp16 sums of probabilities may round above 1


@dataclass(frozen=True)
class Record:
    """One KV head of one layer over Q steps of one sequence; N blocks are those of the last step."""

    sequence: int  # number among those that follow one prompt
    layer: int
    head: int
    first_tokens: int  # length at the first step, its own token included
    scores_QN: Tensor
    mass_QN: Tensor


@dataclass(frozen=True)
class Recording:
    """All records of one document, scores_XQN and mass_XQN in fp16."""

    document: str
    first_tokens: int
    sequences: list[int]
    layers: list[int]
    heads: list[int]
    scores_XQN: Tensor
    mass_XQN: Tensor

    @property
    def steps(self) -> int:
        return self.scores_XQN.shape[1]

    @property
    def nbytes(self) -> int:
        return 2 * (self.scores_XQN.numel() + self.mass_XQN.numel())


def encode(document: str, split: str | None, record: Record, block_size: int) -> dict[str, Any]:
    """Encode a record as one table row; DataError if its shapes or numbers are invalid."""
    steps, blocks = record.scores_QN.shape
    expected = ceil_div(record.first_tokens + steps - 1, block_size)
    where = f"document {document!r}, sequence {record.sequence}, layer {record.layer}, head {record.head}"
    if steps < 2:
        raise DataError(f"{where}: {steps} steps of scores, expected at least 2")
    if blocks != expected:
        raise DataError(f"{where}: {blocks} blocks of scores, expected {expected}")
    if record.mass_QN.shape != record.scores_QN.shape:
        raise DataError(f"{where}: mass is {list(record.mass_QN.shape)}, expected {[steps, blocks]}, as scores are")
    row: dict[str, Any] = {"document": document, "split": split, "sequence": record.sequence}
    row |= {"layer": record.layer, "head": record.head}
    row |= {"first_tokens": record.first_tokens, "steps": steps, "blocks": blocks}
    for name, values in (("scores", record.scores_QN), ("mass", record.mass_QN)):
        if not torch.isfinite(values).all():
            raise DataError(f"{where}: {name} hold NaN or infinity")
        row[name] = values.detach().cpu().half().numpy().astype("<f2").tobytes()
    return row


def stack(path: Path, rows: list[dict[str, Any]], column: str, shape: tuple[int, int]) -> Tensor:
    """Decode and check a binary column as one fp16 tensor [X, Q, N]; `path` is for messages."""
    wanted = 2 * shape[0] * shape[1]
    for row in rows:
        if len(row[column]) != wanted:
            raise DataError(f"{path}: {column} have {len(row[column])} bytes, {shape} in fp16 take {wanted}")
    joined = np.frombuffer(b"".join(row[column] for row in rows), "<f2")
    # The bits of non-negative fp16 numbers have the numbers' order; negative ones, infinity and NaN have larger bits.
    if joined.view("<u2").max(initial=0) > np.float16(LARGEST).view(np.uint16):
        if not np.isfinite(joined).all():
            raise DataError(f"{path}: {column} hold NaN or infinity")
        if joined.min() < 0 or joined.max() > LARGEST:
            raise DataError(f"{path}: {column} reach from {joined.min():.3g} to {joined.max():.3g}, expected 0 to 1")
    return torch.from_numpy(joined.astype(np.float16).reshape(len(rows), *shape))


def schema(pa: types.ModuleType) -> Any:
    """Columns of a shard; scores and mass are fp16, little-endian, [steps, blocks] row by row."""
    whole = ("sequence", "layer", "head", "first_tokens", "steps", "blocks")
    return pa.schema(
        [("document", pa.string()), ("split", pa.string())]
        + [(name, pa.int32()) for name in whole]
        + [("scores", pa.binary()), ("mass", pa.binary())]
    )


def pyarrow_modules() -> tuple[types.ModuleType, types.ModuleType]:
    """Import pyarrow and pyarrow.parquet, which only training needs."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("recordings need pyarrow: pip install 'attention-predictor[train]'") from error
    return pyarrow, pyarrow.parquet
