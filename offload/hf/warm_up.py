"""Warm-up at attach: CUDA loads each kernel at its first use, which takes some ten milliseconds."""

from __future__ import annotations

from dataclasses import replace

import torch

from attention_predictor.offload.attention.dense import Terms
from attention_predictor.offload.blocks.prefetch import SyncPrefetcher
from attention_predictor.offload.hf.layer import TieredLayer
from attention_predictor.offload.hf.versions import layer_config
from attention_predictor.offload.runtime import Runtime
from attention_predictor.offload.stage import Stage
from attention_predictor.offload.stats import DeviceCounts, Stats

TOKENS = 512  # enough for more than one group of the sketch, and for candidates between sink and recent


@torch.no_grad()
def warm_up(runtime: Runtime, stage: Stage, dtype: torch.dtype) -> None:
    """Run a prompt of zeros through a temporary layer of the expected sizes, so that CUDA loads the stage's kernels."""
    config, number = runtime.text_config, min(n for n, own in runtime.stage_of.items() if own is stage)
    shape, heads = runtime.room.shapes[number], getattr(layer_config(config, number), "num_attention_heads", None)
    if shape is None or heads is None:
        return
    heads //= runtime.ranks.parts  # the configuration counts those of all ranks
    if heads % shape.kv_heads:
        return
    own = replace(stage, prefetcher=SyncPrefetcher(), counts=DeviceCounts(stage.device, number + 1))
    alone = replace(runtime, stage_of={number: own}, stats=Stats(), open=True)
    layer = TieredLayer(alone, number)
    query_BHTD = torch.zeros(1, heads, TOKENS, shape.head_dim, dtype=dtype, device=stage.device)
    key_BGTD, value_BGTD = layer.update(*query_BHTD[:, : shape.kv_heads].expand(2, -1, -1, -1, -1).clone())
    layer.attend(query_BHTD, key_BGTD, value_BGTD, Terms(shape.head_dim**-0.5))
