"""How an engine's steps were taken: captured, or not and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attention_predictor.offload.policies import policy_class


def why_not_captured(policy: str, stats: Mapping[str, Any]) -> str | None:
    """Why some of the steps were not captured, as the engine says; ``None`` where all were.

    Args:
        stats: ``Stats.to_dict()`` of an engine that has taken steps.
    """
    if stats["captured_steps"] == stats["steps"]:
        return None
    if policy_class(policy).selects == "all":
        return "it attends to everything"
    return "; ".join(stats["fallbacks"]) or stats["prefetch"]


def how_taken(policy: str, stats: Mapping[str, Any]) -> str:
    """The same in words."""
    reason = why_not_captured(policy, stats)
    if reason is None:
        return "captured"
    some = f"{stats['captured_steps']} of {stats['steps']} captured" if stats["captured_steps"] else "not captured"
    return f"{some}: {reason}"
