"""Shapes of a model's keys and values, derived from its modules and configuration."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig

from attention_predictor.errors import AttachError
from attention_predictor.offload.blocks.room import KVShape
from attention_predictor.offload.hf.versions import layer_config
from attention_predictor.offload.ranks import Ranks

PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")  # what computes keys, alone or with queries and values


def expected_shapes(
    model: nn.Module, config: PreTrainedConfig, layers: list[int], dtype: torch.dtype, ranks: Ranks
) -> dict[int, KVShape | None]:
    """The KV shape of each layer, with this rank's heads; ``None`` where modules and configuration don't tell it.

    Sets ``ranks.parts``.

    Raises:
        AttachError: KV heads can't be divided among the ranks, or not in all layers alike.
    """
    modules: dict[int, nn.Module] = {}
    for module in model.modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) and isinstance(getattr(module, "head_dim", None), int):
            modules.setdefault(number, module)
    shapes = {number: _expected(modules.get(number), config, number, dtype.itemsize) for number in layers}
    if ranks.count == 1:
        return shapes
    name = type(model).__name__
    parts = {_parts(modules.get(number), dtype, shape, name, ranks) for number, shape in shapes.items()}
    if len(parts) > 1:
        raise AttachError(f"{name} divides the KV heads of some layers among {ranks.count} ranks, of others not")
    ranks.parts = parts.pop() if parts else 1
    return {
        number: None if shape is None else shape._replace(kv_heads=shape.kv_heads // ranks.parts)
        for number, shape in shapes.items()
    }


def _expected(module: nn.Module | None, config: PreTrainedConfig, number: int, itemsize: int) -> KVShape | None:
    """With the KV heads of the whole model: a divided linear layer's ``out_features`` counts those of all ranks."""
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


@torch.no_grad()
def _parts(module: nn.Module | None, dtype: torch.dtype, shape: KVShape | None, name: str, ranks: Ranks) -> int:
    """Among how many ranks a layer's KV heads are divided, which its projection's output shows.

    Neither configuration nor weights do: some models divide the weights and gather the outputs.
    """
    projection = next((found for one in PROJECTIONS if (found := getattr(module, one, None)) is not None), None)
    if shape is None or not isinstance(projection, nn.Linear):
        raise AttachError(
            f"{name} has no linear layer {' or '.join(PROJECTIONS)} that shows how its KV heads are divided among "
            f"{ranks.count} ranks: not supported"
        )
    x_W = torch.zeros(1, projection.in_features, dtype=dtype, device=projection.weight.device)
    width = projection(x_W).shape[-1]
    if width == projection.out_features:
        return 1
    if shape.kv_heads % ranks.count or width * ranks.count != projection.out_features:
        raise AttachError(
            f"{name} has {shape.kv_heads} KV heads, which {ranks.count} ranks can't divide: allowed are numbers of "
            f"ranks that divide {shape.kv_heads}"
        )
    return ranks.count
