"""Attachment: the changes that attaching makes to a model, and their undoing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_ABSENT: Any = object()


class Attachment:
    """Changed attention implementations of configs and attributes of modules, each with its previous value.

    Nothing else is changed: no class, no function of transformers, no hook.
    """

    def __init__(self) -> None:
        self._implementations: list[tuple[PreTrainedConfig, str | None, str | None]] = []  # config, before, ours
        self._attributes: list[tuple[nn.Module, str, Any, Any]] = []  # module, name, before, ours

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
        self._attributes.append((module, name, vars(module).get(name, _ABSENT), value))
        vars(module)[name] = value

    def undo(self) -> None:
        """Restore the model. Safe to repeat, and after a change that failed half way."""
        self._set_attributes(ours=False)
        self._set_implementations(ours=False)

    @contextmanager
    def stock_attention(self) -> Iterator[None]:
        """Within it the model uses its own attention functions and masks."""
        self._set_implementations(ours=False)
        try:
            yield
        finally:
            self._set_implementations(ours=True)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Within it the model is the stock model."""
        self.undo()
        try:
            yield
        finally:
            self._set_implementations(ours=True)
            self._set_attributes(ours=True)

    def _set_implementations(self, *, ours: bool) -> None:
        for config, before, own in self._implementations:
            config._attn_implementation_internal = own if ours else before

    def _set_attributes(self, *, ours: bool) -> None:
        for module, name, before, own in self._attributes:
            value = own if ours else before
            if value is _ABSENT:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = value


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
