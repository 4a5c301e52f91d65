"""What differs between versions of transformers and between its models: names, and where things stand.

Version 5.24 renames ``past_key_values`` to ``cache``: in forwards, in outputs, and in ``generate``. The names are read
from what a forward and an output have, not from the version: models outside of transformers keep the old one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

CACHE_NAMES = ("cache", "past_key_values")


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """The name under which a forward takes its cache; ``None`` if it takes none that is known."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def with_cache(model: nn.Module, cache: Cache) -> dict[str, Cache]:
    """The argument that gives the model a cache: ``model(ids, **with_cache(model, cache))``."""
    return {_argument_of(type(model).forward): cache}


@functools.cache
def _argument_of(forward: Callable[..., Any]) -> str:
    return cache_argument(forward) or CACHE_NAMES[0]


def cache_of(output: ModelOutput) -> Cache | None:
    """The cache in a model's output."""
    return getattr(output, _cache_field(output))


def changed(output: ModelOutput, *, cache: Cache | None, **changes: Any) -> ModelOutput:
    """A copy of a model's output with another cache, or none, and other changes.

    To set a field to ``None`` would not do: an output is a dictionary as well, which keeps what it held.
    """
    return type(output)(**dict(output.items()) | {_cache_field(output): cache} | changes)


def _cache_field(output: ModelOutput) -> str:
    names = {field.name for field in fields(output)}  # type: ignore[arg-type]  # outputs are dataclasses
    return next(name for name in CACHE_NAMES if name in names)


def makes_own_cache(model: nn.Module) -> bool:
    """Whether ``generate`` leaves it to the model to make a cache of its own kind."""
    return not getattr(model, "_supports_default_dynamic_cache", lambda: True)()


def decoder_layers(decoder: nn.Module) -> nn.ModuleList | None:
    """The decoder's list of layers; ``None`` if it has none."""
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    return max(lists, key=len, default=None)


def layer_config(config: PreTrainedConfig, number: int) -> PreTrainedConfig:
    """The settings of one layer, where layers may have their own: to read those of the whole raises an error there."""
    return config.per_layer_config[number] if getattr(config, "is_heterogeneous", False) else config
