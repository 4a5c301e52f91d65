"""Intervals of means over samples: percentile bootstrap (Efron 1979, "Bootstrap methods"), Wilson, normal.

Shape suffixes: N samples, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist, stdev

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
_DRAWN_AT_ONCE = 1 << 20  # indices, 8 MiB


def resampled_means(
    scores_N: np.ndarray, weights_N: np.ndarray, *, seed: Sequence[int], resamples: int = RESAMPLES
) -> np.ndarray:
    """Weighted means of samples drawn with replacement, as many as there are.

    The draws depend on ``seed`` and N only. So two sets of scores of the same samples are drawn in pairs, and
    the differences of their means are those of a paired bootstrap.

    Args:
        scores_N, weights_N: float64, one or more.
        seed: Seed for ``numpy.random.default_rng``.

    Returns:
        ``means_R``, float64.
    """
    samples, rng = len(scores_N), np.random.default_rng(list(seed))
    weighted_N, means = scores_N * weights_N, []
    at_once = max(1, _DRAWN_AT_ONCE // samples)
    for first in range(0, resamples, at_once):
        drawn_RN = rng.integers(samples, size=(min(at_once, resamples - first), samples))
        means.append(weighted_N[drawn_RN].sum(1) / weights_N[drawn_RN].sum(1))
    return np.concatenate(means)


def interval(means_R: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The percentiles between which ``level`` of the resampled means are."""
    low, high = np.quantile(means_R, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def wilson_interval(found: int, asked: int) -> tuple[float, float]:
    """95% Wilson score interval of the share ``found / asked``."""
    share, z2 = found / asked, _Z * _Z
    middle = (share + z2 / (2 * asked)) / (1 + z2 / asked)
    half = _Z / (1 + z2 / asked) * (share * (1 - share) / asked + z2 / (4 * asked * asked)) ** 0.5
    return max(middle - half, 0.0), min(middle + half, 1.0)


def normal_spread(values: Sequence[float]) -> float:
    """Half the 95% interval of the mean of two or more values."""
    return _Z * stdev(values) / len(values) ** 0.5
