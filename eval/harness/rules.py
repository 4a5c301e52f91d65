"""Rules: named selection policies with settings, from ``--rule`` and ``--policies``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attention_predictor.errors import ConfigError, SettingError
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.settings import read_setting

STOCK = "full"  # this policy without other settings: the stock model with its whole cache
_DIRECTORY = re.compile(r"[\w.=,+ -]+")


@dataclass(frozen=True)
class Rule:
    """A named policy with the settings that differ from the default ``OffloadConfig``."""

    name: str
    settings: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Rule:
        """``[name:] policy[,field=value…]``; numbers of several layers are joined by ``+``.

        Raises:
            ConfigError: Names the field that is wrong.
        """
        name, _, rest = text.rpartition(":")
        policy, *pairs = (part.strip() for part in rest.split(","))
        settings: dict[str, Any] = {"policy": policy}
        for pair in pairs:
            field, equals, value = (part.strip() for part in pair.partition("="))
            if not equals:
                raise ConfigError(f"--rule {text!r}: {field!r} has no value, expected field=value")
            if field in settings:
                raise ConfigError(f"--rule {text!r}: {field} is given twice")
            try:
                settings[field] = read_setting(field, value)
            except ConfigError as error:
                raise ConfigError(f"--rule {text!r}: {error}") from error
        return cls(name.strip() or rest.strip(), settings)

    def config(self, budget: int, **defaults: Any) -> OffloadConfig:
        """The ``OffloadConfig`` at a budget; ``defaults`` fill settings that the rule does not set.

        Raises:
            ConfigError: Names the rule, where it gives the field that is wrong.
        """
        try:
            return OffloadConfig(**{"budget": budget} | defaults | self.settings)
        except SettingError as error:
            if error.name not in self.settings:
                raise
            raise ConfigError(f"rule {self.name!r}: {error}") from error


def check_names(rules: Sequence[Rule], what: str) -> None:
    """``ConfigError`` if two have one name; ``what`` must not be."""
    names = [rule.name for rule in rules]
    if len(set(names)) < len(names):
        raise ConfigError(f"{what}, got {', '.join(names)}")


def check_variants(rules: Sequence[Rule]) -> None:
    """``ConfigError`` for a name that can't be a directory's, or for a budget where several are tried."""
    for rule in rules:
        if not _DIRECTORY.fullmatch(rule.name) or rule.name.startswith("."):
            raise ConfigError(f"rule {rule.name!r} can't name a directory: give it another name (name: policy,…)")
        if "budget" in rule.settings and rule.settings["policy"] != STOCK:
            raise ConfigError(f"rule {rule.name!r}: set budgets with --budgets, not in the rule")
