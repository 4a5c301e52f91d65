"""Shapes of a model's keys and values, derived from its modules and configuration."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

from attention_predictor.offload.blocks.room import KVShape
from attention_predictor.offload.hf.versions import layer_config


def expected_shapes(
    model: nn.Module, config: PreTrainedConfig, layers: list[int], itemsize: int
) -> dict[int, KVShape | None]:
    """The KV shape of each layer; ``None`` where modules and configuration do not determine it."""
    modules: dict[int, nn.Module] = {}
    for module in model.modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) and isinstance(getattr(module, "head_dim", None), int):
            modules.setdefault(number, module)
    return {number: _expected(modules.get(number), config, number, itemsize) for number in layers}


def _expected(module: nn.Module | None, config: PreTrainedConfig, number: int, itemsize: int) -> KVShape | None:
    own = layer_config(config, number)
    heads = getattr(own, "num_attention_heads", None)
    kv_heads = getattr(own, "num_key_value_heads", None) or heads
    head_dim = getattr(module, "head_dim", None) or getattr(own, "head_dim", None)
    if head_dim is None and heads and getattr(own, "hidden_size", None):
        head_dim = own.hidden_size // heads
    projection = getattr(module, "k_proj", None)
    if head_dim and isinstance(projection, nn.Linear) and projection.out_features % head_dim == 0:
        kv_heads = projection.out_features // head_dim
    if not isinstance(kv_heads, int) or not isinstance(head_dim, int):
        return None
    return KVShape(kv_heads, head_dim, itemsize)
