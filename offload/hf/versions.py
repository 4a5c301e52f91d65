"""Differences between versions of transformers and between its models.

Version 5.24 renames ``past_key_values`` to ``cache``: in forwards, in outputs, and in ``generate``. The names are read
from the forward's signature and the output's fields, not from the version: models outside transformers keep the old
names. Until 5.23 gradient checkpointing keeps caches from layers also where no gradients are recorded.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

CACHE_NAMES = ("cache", "past_key_values")
CHECKPOINT = "_gradient_checkpointing_func"  # of a module under gradient checkpointing
CHECKPOINTS_WITHOUT_GRADIENTS = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24)


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """The name of a forward's cache argument; ``None`` if it has none of the known ones."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def with_cache(model: nn.Module, cache: Cache) -> dict[str, Cache]:
    """The cache as a keyword argument of the model: ``model(ids, **with_cache(model, cache))``."""
    return {_argument_of(type(model).forward): cache}


@functools.cache
def _argument_of(forward: Callable[..., Any]) -> str:
    return cache_argument(forward) or CACHE_NAMES[0]


def cache_of(output: ModelOutput) -> Cache | None:
    """The cache in a model's output."""
    return getattr(output, _cache_field(output))


def changed(output: ModelOutput, *, cache: Cache | None, **changes: Any) -> ModelOutput:
    """A copy of a model's output with another cache (or ``None``) and other changed fields.

    Setting a field to ``None`` is not enough: an output is also a dictionary, which would keep the old value.
    """
    return type(output)(**dict(output.items()) | {_cache_field(output): cache} | changes)


def _cache_field(output: ModelOutput) -> str:
    names = {field.name for field in fields(output)}  # type: ignore[arg-type]  # outputs are dataclasses
    return next(name for name in CACHE_NAMES if name in names)


def checkpointed(model: nn.Module) -> list[nn.Module]:
    """The modules that a forward now would checkpoint, without a cache; each has the attribute ``CHECKPOINT``."""
    if not model.training or not (torch.is_grad_enabled() or CHECKPOINTS_WITHOUT_GRADIENTS):
        return []
    return [one for one in model.modules() if getattr(one, "gradient_checkpointing", False) and CHECKPOINT in vars(one)]


def makes_own_cache(model: nn.Module) -> bool:
    """Whether the model makes its own kind of cache in ``generate``."""
    return not getattr(model, "_supports_default_dynamic_cache", lambda: True)()


def decoder_layers(decoder: nn.Module) -> nn.ModuleList | None:
    """The decoder's list of layers; ``None`` if it has none."""
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    return max(lists, key=len, default=None)


def layer_config(config: PreTrainedConfig, number: int) -> PreTrainedConfig:
    """One layer's configuration. In heterogeneous models, reading such values from the whole configuration raises."""
    return config.per_layer_config[number] if getattr(config, "is_heterogeneous", False) else config
