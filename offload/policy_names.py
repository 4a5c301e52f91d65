"""Names of the selection policies: the allowed values of ``OffloadConfig.policy``. Imports no policy and no torch."""

from __future__ import annotations

# By name: module in ``offload.policies``, and class.
BUILT_IN = {
    "full": ("full", "Full"),
    "streaming": ("streaming", "Streaming"),
    "quest": ("quest", "Quest"),
    "quest-ahead": ("quest", "QuestAhead"),
    "predictor": ("predictor", "PredictorPolicy"),
    "oracle": ("oracle", "Oracle"),
    "h2o": ("h2o", "H2O"),
    "snapkv": ("snapkv", "SnapKV"),
    "pyramidkv": ("pyramidkv", "PyramidKV"),
    "cake": ("cake", "CAKE"),
    "tappa": ("tappa", "TAPPA"),
    "lazy-eviction": ("lazy_eviction", "LazyEviction"),
}
_names = list(BUILT_IN)


def policy_names() -> tuple[str, ...]:
    """The names ``OffloadConfig.policy`` may have."""
    return tuple(_names)


def add_policy_name(name: str) -> None:
    """One more name, of a policy that is registered."""
    if name not in _names:
        _names.append(name)
