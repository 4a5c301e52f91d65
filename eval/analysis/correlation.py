"""Rank correlation, and how far it can be trusted: Spearman's rho, with a percentile bootstrap over the pairs.

Suffixes: X pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attention_predictor.eval.bootstrap import RESAMPLES, interval


@dataclass(frozen=True)
class Correlation:
    """Of two figures, over so many pairs; the interval is that of 95%, ``None`` where half the draws have none."""

    rho: float | None
    interval: tuple[float, float] | None
    pairs: int


def rank_correlation(found: Sequence[tuple[float | None, float | None]], seed: int) -> Correlation:
    """Spearman's rho over the pairs of which both are known; ``None`` where either has but one value."""
    pairs = [(a, b) for a, b in found if a is not None and b is not None]
    if len(pairs) < 2:
        return Correlation(None, None, len(pairs))
    values_2X = np.array(pairs, np.float64).T
    rho = spearman(*values_2X)
    rng = np.random.default_rng(seed)
    drawn = (spearman(*values_2X[:, rng.integers(len(pairs), size=len(pairs))]) for _ in range(RESAMPLES))
    known = np.array([value for value in drawn if not math.isnan(value)])
    return Correlation(
        None if math.isnan(rho) else rho, interval(known) if len(known) >= RESAMPLES / 2 else None, len(pairs)
    )


def spearman(one_X: np.ndarray, other_X: np.ndarray) -> float:
    """Correlation of ranks, equal values sharing the mean of theirs; NaN where either is constant."""
    ranks = [ranks_of(values) - (len(values) - 1) / 2 for values in (one_X, other_X)]
    norm = math.sqrt(float((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum()) / norm if norm else math.nan


def ranks_of(values_X: np.ndarray) -> np.ndarray:
    """Ranks from 0 on, float64."""
    _, place_X, count = np.unique(values_X, return_inverse=True, return_counts=True)
    last = np.cumsum(count) - 1
    return (last - (count - 1) / 2)[place_X]
