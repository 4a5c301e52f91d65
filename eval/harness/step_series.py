"""Hit rate and fetched bytes by decoding step, as series of bounded length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean

from transformers import PreTrainedModel

from attention_predictor.eval.harness.predictions import Record
from attention_predictor.offload.engine import Engine

MOST = 64  # values of a series


@dataclass
class StepSeries:
    """Figures of steps, each value the sum over ``stride`` of them; the stride doubles when there are too many values.

    Attributes:
        stride: Steps that a value stands for.
        steps: Steps so far.
        sums: A list of ``MOST`` values at most for each figure.
    """

    stride: int = 1
    steps: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **figures: float) -> None:
        """One step more."""
        for name, figure in figures.items():
            values = self.sums.setdefault(name, [])
            if self.steps % self.stride:
                values[-1] += figure
            else:
                values.append(figure)
        self.steps += 1
        if self.steps == MOST * self.stride:
            self.stride *= 2
            self.sums = {
                name: [one + other for one, other in zip(values[::2], values[1::2], strict=True)]
                for name, values in self.sums.items()
            }

    def record(self) -> Record:
        """The series for a record: steps, stride, and mean figures of a step (``None`` if no block was read)."""
        pairs = zip(self.sums.get("hit", ()), self.sums.get("wanted", ()), strict=True)
        counts = [min(self.stride, self.steps - start) for start in range(0, self.steps, self.stride)]
        fetched = zip(self.sums.get("fetched", ()), counts, strict=True)
        return {
            "steps": self.steps,
            "stride": self.stride,
            "hit_rate": [round(hit / wanted, 4) if wanted else None for hit, wanted in pairs],
            "fetched_bytes": [round(total / count) for total, count in fetched],
        }


@contextmanager
def record_steps(model: PreTrainedModel, engine: Engine | None) -> Iterator[StepSeries]:
    """Record the steps that a model takes in the ``with`` block; nothing for the stock model (``None``).

    The first step after a prompt is left out: it fetches a whole selection, later steps only new blocks.
    To look at captured steps waits for the device, once a step.
    """
    series = StepSeries()
    if engine is None:
        yield series
        return

    def figures() -> tuple[int, int, int, int]:
        stats = engine.stats
        return stats.steps, stats.wanted_blocks, stats.hit_blocks, stats.fetched_bytes

    before, fresh = figures(), True

    def look(*_: object) -> None:
        nonlocal before, fresh
        now = figures()
        stepped = now[0] > before[0]
        if stepped and not fresh:
            series.add(wanted=now[1] - before[1], hit=now[2] - before[2], fetched=now[3] - before[3])
        before, fresh = now, not stepped

    hook = model.register_forward_hook(look)
    try:
        yield series
    finally:
        hook.remove()


def mean_series(records: Sequence[Record], name: str) -> list[tuple[int, float]]:
    """Mean of a figure by step, over samples with that many steps. Steps are counted from 1.

    Args:
        records: Results of ``StepSeries.record``.
        name: ``hit_rate`` or ``fetched_bytes``.
    """
    stride = max((one["stride"] for one in records), default=1)
    most = max((one["steps"] for one in records), default=0)
    points = []
    for start in range(0, most, stride):
        means = []
        for one in records:
            values = one[name][start // one["stride"] : (start + stride) // one["stride"]]
            known = [value for value in values if value is not None]
            means += [fmean(known)] if known else []
        if means:
            points.append((start + 1, fmean(means)))
    return points
