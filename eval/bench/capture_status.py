"""Whether an engine's steps were captured, and if not, why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attention_predictor.offload.policies import policy_class


def why_not_captured(policy: str, stats: Mapping[str, Any]) -> str | None:
    """The engine's reason for steps that were not captured; ``None`` if all were.

    Args:
        stats: ``Stats.to_dict()`` of an engine that has taken steps.
    """
    if stats["captured_steps"] == stats["steps"]:
        return None
    if policy_class(policy).selects == "all":
        return "it attends to everything"
    return "; ".join(stats["fallbacks"]) or stats["prefetch"]


def how_taken(policy: str, stats: Mapping[str, Any]) -> str:
    """``captured``, or the reason of ``why_not_captured`` in words."""
    reason = why_not_captured(policy, stats)
    if reason is None:
        return "captured"
    some = f"{stats['captured_steps']} of {stats['steps']} captured" if stats["captured_steps"] else "not captured"
    return f"{some}: {reason}"
