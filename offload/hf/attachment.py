"""Attachment: the changes that attaching makes to a model, and their undoing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from attention_predictor.offload.hf.turns import Turns
from attention_predictor.offload.hf.versions import CHECKPOINT, checkpointed

_ABSENT: Any = object()


class Attachment:
    """Changed attention implementations of configs and attributes of modules, each with its previous value.

    Nothing else is changed: no class, no function of transformers, no hook.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._turns = Turns(self._switch)
        self._undone = False
        self._checkpointing: list[tuple[nn.Module, Callable[..., Any]]] = []  # module, its function before
        self._implementations: list[tuple[PreTrainedConfig, str | None, str | None]] = []  # config, before, ours
        self._attributes: list[tuple[nn.Module, str, Any]] = []  # module, name, before

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

    def undo(self) -> None:
        """Restore the model. Safe to repeat, and after a change that failed half way."""
        self._undone = True
        for module, name, before in self._attributes:
            if before is _ABSENT:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = before
        self._set_implementations(ours=False)
        self._leave_checkpointing()

    def forwards(self, *, stock: bool) -> AbstractContextManager[None]:
        """Within it the model uses our attention function, or stock ones and their masks; waits for the other kind."""
        return self._turns.take(stock=stock)

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
        if self._undone:
            return
        self._set_implementations(ours=not stock)
        if not stock:
            self._leave_checkpointing()
            return
        for module in checkpointed(self._model):
            own = vars(module)[CHECKPOINT]
            self._checkpointing.append((module, own))
            vars(module)[CHECKPOINT] = self._recomputed_as_stock(own)

    def _leave_checkpointing(self) -> None:
        for module, own in self._checkpointing:
            vars(module)[CHECKPOINT] = own
        self._checkpointing = []

    def _recomputed_as_stock(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """Gradient checkpointing computes a layer again in ``backward``, when the stock forward is over."""

        def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def as_stock(*args: Any, **kwargs: Any) -> Any:
                with self.forwards(stock=True):
                    return function(*args, **kwargs)

            return own(as_stock, *args, **kwargs)

        return checkpointed

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
