"""Selection policies by name: one short file each, imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from attention_predictor.errors import ConfigError
from attention_predictor.lazy import lazy_names
from attention_predictor.offload.policy_names import BUILT_IN, add_policy_name, policy_names

if TYPE_CHECKING:
    from attention_predictor.offload.policies.base import LayerSpec as LayerSpec
    from attention_predictor.offload.policies.base import Policy as Policy
    from attention_predictor.offload.policies.base import Step as Step

_REGISTERED: dict[str, type[Policy]] = {}

_OF_BASE = dict.fromkeys(("LayerSpec", "Policy", "Step"), f"{__name__}.base")

__all__ = [*_OF_BASE, "policy_class", "policy_names", "register"]

__getattr__, __dir__ = lazy_names(__name__, _OF_BASE)


def register(policy: type[Policy]) -> type[Policy]:
    """Make ``policy`` available under its name."""
    if policy.name in policy_names() and (taken := policy_class(policy.name)) is not policy:
        raise ConfigError(f"policy name {policy.name!r} is already used by {taken.__name__}")
    _REGISTERED[policy.name] = policy
    add_policy_name(policy.name)
    return policy


def policy_class(name: str) -> type[Policy]:
    """The policy of that name, or a ``ConfigError`` that lists the valid ones."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in BUILT_IN:
        raise ConfigError(f"policy={name!r} is not allowed: expected one of {', '.join(policy_names())}")
    module, policy = BUILT_IN[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), policy)
