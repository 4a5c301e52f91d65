"""How far a mean over samples can be trusted: percentile bootstrap (Efron 1979, "Bootstrap methods").

Shape suffixes: N samples, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_DRAWN_AT_ONCE = 1 << 20  # indices, 8 MiB


def resampled_means(
    scores_N: np.ndarray, weights_N: np.ndarray, *, seed: Sequence[int], resamples: int = RESAMPLES
) -> np.ndarray:
    """Weighted means of samples drawn with replacement, as many as there are.

    The draws depend on ``seed`` and N alone. Two sets of scores of the same samples are thereby drawn in pairs, and
    the differences of their means are those of a paired bootstrap.

    Args:
        scores_N, weights_N: float64, one or more.
        seed: Of ``numpy.random.default_rng``.

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
