"""Attachment: the changes that attaching makes to a model, and their undoing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from attention_predictor.offload.hf.recomputed import RecomputedAsStock
from attention_predictor.offload.hf.turns import Turns
from attention_predictor.offload.hf.versions import CHECKPOINT

_ABSENT: Any = object()


class Attachment:
    """Changed attention implementations of configs and attributes of modules, each with its previous value.

    Nothing else is changed: no class, no function of transformers, no hook.
    """

    def __init__(self) -> None:
        self.turns = Turns(self._switch)
        self._implementations: list[tuple[PreTrainedConfig, str | None, str | None]] = []  # config, before, ours
        self._attributes: list[tuple[nn.Module, str, Any]] = []  # module, name, before
        self._checkpointed: list[nn.Module] = []
        self._undone = False

    def implementations_set_by(
        self, change: Callable[[], None], configs: list[PreTrainedConfig], keep: list[Any]
    ) -> None:
        """Run ``change``, undo its effect on configs outside ``keep``, and remember its effect on those in ``keep``."""
        before = [(config, config._attn_implementation_internal) for config in configs]
        try:
            change()
        finally:
            for config, implementation in before:
                if any(config is one for one in keep):
                    self._implementations.append((config, implementation, config._attn_implementation_internal))
                else:
                    config._attn_implementation_internal = implementation

    def attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute on this module object, overriding its class's."""
        self._attributes.append((module, name, vars(module).get(name, _ABSENT)))
        vars(module)[name] = value

    def recompute_as_stock(self, modules: list[nn.Module]) -> None:
        """Wrap the checkpointing functions of these modules, unless they are; one that is replaced is wrapped again."""
        with self.turns.lock:
            for module in modules:
                own = vars(module)[CHECKPOINT]
                if not self._undone and not isinstance(own, RecomputedAsStock):
                    self._checkpointed.append(module)
                    vars(module)[CHECKPOINT] = RecomputedAsStock(own, self.turns)

    def undo(self) -> None:
        """Restore the model. Safe to repeat, after a change that failed half way, and while other threads use it."""
        with self.turns.lock:
            self._undone = True
            for module, name, before in self._attributes:
                if before is _ABSENT:
                    vars(module).pop(name, None)
                else:
                    vars(module)[name] = before
            self._set_implementations(ours=False)
            for module in self._checkpointed:
                if isinstance(wrapped := vars(module).get(CHECKPOINT), RecomputedAsStock):
                    vars(module)[CHECKPOINT] = wrapped.own

    def copy_of(self, module: nn.Module, memo: dict[int, Any]) -> nn.Module:
        """A deep copy of a changed module, as it was before. Other threads may use the module meanwhile."""
        before = {name: value for one, name, value in self._attributes if one is module}
        kept = {name: value for name, value in vars(module).items() if name not in before}
        kept |= {name: value for name, value in before.items() if value is not _ABSENT}
        memo[id(module)] = copied = type(module).__new__(type(module))
        vars(copied).update(copy.deepcopy(kept, memo))
        for config, implementation, _ in self._implementations:
            if id(config) in memo:
                memo[id(config)]._attn_implementation_internal = implementation
        return copied

    def _switch(self, stock: bool) -> None:
        if not self._undone:
            self._set_implementations(ours=not stock)

    def _set_implementations(self, *, ours: bool) -> None:
        for config, before, own in self._implementations:
            config._attn_implementation_internal = own if ours else before


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config whose attention implementation attaching may change: the model's, its parts' and their parts'."""
    found: dict[int, PreTrainedConfig] = {}

    def visit(config: PreTrainedConfig | None) -> None:
        if config is not None and id(config) not in found:
            found[id(config)] = config
            for name in config.sub_configs:
                visit(getattr(config, name, None))

    visit(model.config)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            visit(module.config)
    return list(found.values())
