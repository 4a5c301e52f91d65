"""Spearman's rank correlation with a percentile bootstrap interval over the pairs.

Suffixes: X pairs, K different values, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from attention_predictor.eval.harness.bootstrap import RESAMPLES, interval


@dataclass(frozen=True)
class Correlation:
    """Correlation of two figures over ``pairs`` pairs; ``interval`` (95%) is ``None`` if half the draws have no rho."""

    rho: float | None
    interval: tuple[float, float] | None
    pairs: int


def rank_correlation(found: Sequence[tuple[float | None, float | None]], seed: int) -> Correlation:
    """Spearman's rho over the pairs of which both are known; ``None`` where either has but one value."""
    pairs = [(a, b) for a, b in found if a is not None and b is not None]
    if len(pairs) < 2:
        return Correlation(None, None, len(pairs))
    one_X, other_X = np.array(pairs, np.float64).T
    count = len(pairs)
    rho = float(spearman(one_X, other_X, np.ones((1, count)))[0])
    # How often each pair is drawn says all of a resample.
    times_RX = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=RESAMPLES)
    rho_R = spearman(one_X, other_X, times_RX.astype(np.float64))
    known = rho_R[~np.isnan(rho_R)]
    ends = interval(known) if len(known) >= RESAMPLES / 2 else None
    return Correlation(None if math.isnan(rho) else rho, ends, count)


def spearman(one_X: np.ndarray, other_X: np.ndarray, times_RX: np.ndarray) -> np.ndarray:
    """Correlation of ranks ``[R]`` with each pair repeated ``counts`` times; NaN if either figure has one value."""
    ranks = [_ranks(values_X, times_RX) for values_X in (one_X, other_X)]
    one_RX, other_RX = (rank_RX - (times_RX.sum(1, keepdims=True) - 1) / 2 for rank_RX in ranks)  # less their mean
    product, one, other = ((times_RX * x).sum(1) for x in (one_RX * other_RX, one_RX**2, other_RX**2))
    norm = np.sqrt(one * other)
    return np.divide(product, norm, out=np.full(len(norm), np.nan), where=norm > 0)


def _ranks(values_X: np.ndarray, times_RX: np.ndarray) -> np.ndarray:
    """Ranks from 0 on ``[R, X]``; equal values share the mean of theirs."""
    different, place_X = np.unique(values_X, return_inverse=True)
    count_RK = times_RX @ (place_X[:, None] == np.arange(len(different)))
    return (count_RK.cumsum(1) - (count_RK + 1) / 2)[:, place_X]
