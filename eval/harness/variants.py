"""Variants: the rows of a table, each a selection policy at a budget."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from attention_predictor.errors import ConfigError
from attention_predictor.eval.harness.rules import STOCK, Rule, check_names, check_variants
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.engine import Engine
from attention_predictor.offload.hf.attach import attach
from attention_predictor.offload.policies import policy_class
from attention_predictor.offload.policies.predictor import PredictorPolicy
from attention_predictor.predictor.model import AttentionPredictor


@dataclass(frozen=True)
class Variant:
    """A rule at a budget.

    ``full`` is the stock model with its whole cache, without our code: the reference must not depend on the code under
    test. It therefore needs the memory of the stock model. If that is too much, a rule such as ``full,prefetch=thread``
    attends to everything through the engine, streaming from host memory.

    Attributes:
        name: The rule's name and, unless it attends to everything, the budget: its directory.
        policy: The policy's name.
        budget: Tokens a step attends to; ``None`` for all.
        config: Settings of its engine; ``None`` for the stock model.
        weights: Digest of its predictor's weights; ``None`` without a predictor.
    """

    name: str
    policy: str
    budget: int | None
    config: OffloadConfig | None
    weights: str | None = None

    @classmethod
    def of(cls, rule: Rule, budget: int, **defaults: Any) -> Variant:
        """Check all settings; raises ``ConfigError`` or ``CheckpointError`` for a bad one.

        Args:
            defaults: Settings of its engine that the rule does not set.
        """
        weights = check_rule(rule, budget)
        policy = rule.settings["policy"]
        config = None if rule.settings == {"policy": STOCK} else rule.config(budget, **defaults)
        if policy_class(policy).selects == "all":
            return cls(rule.name, policy, None, config, weights)
        return cls(f"{rule.name}-{budget}", policy, budget, config, weights)

    def attached(self, model: PreTrainedModel) -> AbstractContextManager[Engine | None]:
        """The model under this variant, within a ``with`` block."""
        return nullcontext() if self.config is None else attach(model, self.config)

    def describe(self) -> dict[str, Any]:
        """What decides its results."""
        settings = {} if self.config is None else self.config.to_dict()
        if self.weights is not None:
            settings["predictor_weights"] = self.weights
            if (directory := Path(settings["predictor"])).is_dir():
                settings["predictor"] = str(directory.resolve())
        return settings | {"policy": self.policy, "budget": self.budget, "stock": self.config is None}


def check_rule(rule: Rule, budget: int) -> str | None:
    """Refuse bad settings, and a predictor that can't be loaded, before anything runs.

    Returns:
        A digest of the predictor's weights; ``None`` if the rule has no predictor.
    """
    config = rule.config(budget)
    if not issubclass(policy_class(config.policy), PredictorPolicy):
        return None
    predictor = AttentionPredictor.from_pretrained(config.predictor, block_size=config.block_size)
    digest = hashlib.sha256(predictor.arch.encode())
    for name, tensor in sorted(predictor.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def make_variants(rules: Sequence[Rule], budgets: Sequence[int], **defaults: Any) -> list[Variant]:
    """Every rule at every budget, in this order; rules that attend to everything appear once."""
    check_names(rules, "policies must differ in name")
    check_variants(rules)
    variants = [Variant.of(rule, budget, **defaults) for rule in rules for budget in budgets]
    found: dict[str, Variant] = {}
    for variant in variants:
        if found.setdefault(variant.name, variant).describe() != variant.describe():
            raise ConfigError(f"two rules give variants of one name, {variant.name}: names must differ")
    return list(found.values())
