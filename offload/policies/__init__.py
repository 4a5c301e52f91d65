"""Selection policies by name: one short file each."""

from __future__ import annotations

from attention_predictor.offload.policies.base import LayerSpec, Policy, Step
from attention_predictor.offload.policies.cake import CAKE
from attention_predictor.offload.policies.full import Full
from attention_predictor.offload.policies.h2o import H2O
from attention_predictor.offload.policies.lazy_eviction import LazyEviction
from attention_predictor.offload.policies.oracle import Oracle
from attention_predictor.offload.policies.predictor import Predictor
from attention_predictor.offload.policies.pyramidkv import PyramidKV
from attention_predictor.offload.policies.quest import Quest, QuestAhead
from attention_predictor.offload.policies.snapkv import SnapKV
from attention_predictor.offload.policies.streaming import Streaming
from attention_predictor.offload.policies.tappa import TAPPA
from attention_predictor.predictor.errors import ConfigError

_REGISTRY: dict[str, type[Policy]] = {}


def register(policy: type[Policy]) -> type[Policy]:
    """Make ``policy`` available under its name."""
    if _REGISTRY.get(policy.name, policy) is not policy:
        raise ConfigError(f"policy name {policy.name!r} is taken by {_REGISTRY[policy.name].__name__}")
    _REGISTRY[policy.name] = policy
    return policy


def policy_names() -> tuple[str, ...]:
    """The names ``OffloadConfig.policy`` may have."""
    return tuple(_REGISTRY)


def policy_class(name: str) -> type[Policy]:
    """The policy of that name, or a ``ConfigError`` that lists the valid ones."""
    if name not in _REGISTRY:
        raise ConfigError(f"policy={name!r} is not allowed: expected one of {', '.join(_REGISTRY)}")
    return _REGISTRY[name]


for _policy in (
    Full,
    Streaming,
    Quest,
    QuestAhead,
    Predictor,
    Oracle,
    H2O,
    SnapKV,
    PyramidKV,
    CAKE,
    TAPPA,
    LazyEviction,
):
    register(_policy)

__all__ = ["LayerSpec", "Policy", "Step", "policy_class", "policy_names", "register"]
