"""One decoding step of one layer: the order of its parts, for every policy and device, eager or captured.

append → estimate → choose (late) → attend → observe → predict → choose ahead → fetch

No operation here or below reads a device value on the host: lengths are tensors, and shapes follow from the capacity.
So the same operations run one by one or as part of a CUDA graph.

Suffixes: B sequences, G KV heads, H query heads, Q queries, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

from torch import Tensor

from attention_predictor.csrc.ops import Estimates
from attention_predictor.offload.attention.dense import Terms
from attention_predictor.offload.attention.sparse import attend_slots, score_slots
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.blocks.layer_blocks import LayerBlocks
from attention_predictor.offload.blocks.selection import Selection
from attention_predictor.offload.chunk import Chunk, chunk_tokens
from attention_predictor.offload.policies.base import Policy, Step
from attention_predictor.offload.step.schedule import Schedule


class Layer(Protocol):
    """What a step needs of a layer."""

    blocks: LayerBlocks
    policy: Policy
    selection: Selection
    kernel: bool
    arrived_BH: Tensor | None


def decode(
    layer: Layer,
    query_BHQD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    terms: Terms,
    real_BL: Tensor | None,
    schedule: Schedule,
    watch: Callable[[Step], None] | None = None,
) -> Tensor:
    """Attention of one new token per sequence, already counted in ``layer.blocks.extent``; ``[B, H, 1, D]``.

    Args:
        query_BHQD, key_BGTD, value_BGTD: Of the new token: Q = T = 1.
        real_BL: bool, False at padding, for the whole capacity; ``None`` if there is no padding.
        watch: Called with the step after attention, before the policy observes it.
    """
    blocks, policy, selection = layer.blocks, layer.policy, layer.selection
    query_BHD, key_BGD, value_BGD = (x[:, :, 0].contiguous() for x in (query_BHQD, key_BGTD, value_BGTD))
    schedule.begin()
    extent, pool = blocks.extent, blocks.pool
    blocks.append_token(key_BGD, value_BGD, extent)
    step = Step(
        query_BHD=query_BHD,
        extent=extent,
        real_BL=real_BL,
        terms=terms,
        kv_heads=blocks.kv_heads,
        kernel=layer.kernel,
        length=blocks.length,
        stream=partial(chunks, blocks),
    )
    visible = (extent.length_B, real_BL, terms)
    with schedule.on_sketch_stream():
        policy.append(key_BGD, query_BHD, extent)
        scores = policy.score_now(step)
    if isinstance(scores, Estimates):
        if policy.chooses:  # resident blocks have exact scores
            resident = score_slots(query_BHD, pool.key_BGSTD, blocks.block_BGS, *visible, kernel=layer.kernel)
            scores = scores._replace(slot_peak_BHS=resident.peak_BHS, slot_sum_BHS=resident.sum_BHS)
        step.estimates = scores
    schedule.join_sketch()
    if scores is not None:
        late_blocks = selection.share_of_budget(policy.late_share(len(query_BHD))) if policy.chooses else None
        step.rest_BH = blocks.choose(selection, extent, scores, late_blocks)
    step.block_BGS = blocks.active_BGS
    step.attention = attend_slots(
        query_BHD,
        pool.key_BGSTD,
        pool.value_BGSTD,
        step.block_BGS,
        *visible,
        kernel=layer.kernel,
        arrived_BH=layer.arrived_BH,
    )
    if watch is not None:
        watch(step)
    with schedule.on_prefetch_stream(step):
        if not policy.chooses:
            blocks.count_attended()
        policy.observe(step)
        fetch_ahead(layer, extent, schedule)
    return step.attention.out_BHD[:, :, None]


def fetch_ahead(layer: Layer, extent: Extent, schedule: Schedule) -> None:
    """Choose and fetch the blocks for the token that follows ``extent``."""
    policy = layer.policy
    more = layer.selection.ahead_blocks if policy.chooses else 0
    scores = policy.score_next(extent), policy.unspent(extent)
    layer.blocks.fetch_ahead(layer.selection, extent, *scores, more, schedule.fetch)


def chunks(blocks: LayerBlocks, query_BHQD: Tensor, stop: int | None = None) -> Iterator[Chunk]:
    """Keys and values of the tokens before ``stop`` (default: all), from host memory, in chunks sized for the query.

    A chunk is valid until the next one is requested.
    """
    return (Chunk(*part) for part in blocks.stream(chunk_tokens(query_BHQD), stop))


def attend_again(layer: Layer, query_BHQD: Tensor, terms: Terms, real_BL: Tensor | None) -> Tensor:
    """Attention of another layer that shares this layer's keys, over the same pool; ``[B, H, 1, D]``.

    The fetches for the next token must be complete: its blocks are the active ones now.
    """
    pool, block_BGS = layer.blocks.pool, layer.blocks.active_BGS
    visible = (layer.blocks.extent.length_B, real_BL, terms)
    query_BHD = query_BHQD[:, :, 0].contiguous()
    attention = attend_slots(query_BHD, pool.key_BGSTD, pool.value_BGSTD, block_BGS, *visible, kernel=layer.kernel)
    return attention.out_BHD[:, :, None]
