"""Made-up recordings whose next step can be learned."""

from __future__ import annotations

from pathlib import Path

import torch

from attention_predictor.train.dataset import HistoryWriter
from attention_predictor.train.shards import Record

META = {"block_size": 16, "sink": 64, "recent": 64, "model": "made-up", "rows": "full"}


def make_record(seed: int, *, layer: int = 0, head: int = 0, steps: int = 120, first_tokens: int = 1100) -> Record:
    """Attention that sweeps over the document, a block every 4 steps, under noise: its next place is learnable."""
    generator = torch.Generator().manual_seed(seed)
    n_blocks = -(-(first_tokens + steps - 1) // 16)
    step_Q1, block_N = torch.arange(steps)[:, None], torch.arange(n_blocks)
    start = int(torch.randint(8, n_blocks - 8 - steps // 4, (1,), generator=generator))
    centre_Q1 = start + (step_Q1 + 3) // 4
    logits_QN = 6.0 * (block_N == centre_Q1) + 0.8 * torch.randn(steps, n_blocks, generator=generator)
    entered_QN = block_N < -(-(first_tokens + step_Q1) // 16)
    mass_QN = logits_QN.masked_fill(~entered_QN, -torch.inf).softmax(-1)
    return Record(0, layer, head, first_tokens, mass_QN / 4, mass_QN)


def make_recording(directory: Path, documents: int = 6, *, files: int | None = None, **shape: int) -> HistoryWriter:
    """Documents of 4 heads each, taken in turn from so many files."""
    writer = HistoryWriter(directory, META)
    for i in range(documents):
        records = (make_record(10 * i + head, head=head, layer=head % 2, **shape) for head in range(4))
        writer.write(f"books/{i}: a title?", records, group=None if files is None else f"file {i % files}")
    return writer
