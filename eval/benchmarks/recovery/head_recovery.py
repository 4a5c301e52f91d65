"""Measures recovery by KV head while a cache is decoded with.

Suffixes: B sequences, G KV heads, N blocks, C blocks there is room for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from attention_predictor.errors import ConfigError
from attention_predictor.eval.benchmarks.recovery.block_map import codes_of
from attention_predictor.eval.harness.variants import Variant
from attention_predictor.offload.config import CAPTURING
from attention_predictor.offload.hf.layer import TieredLayer
from attention_predictor.offload.policies import Step, policy_class
from attention_predictor.offload.step.recovery import measure


class HeadRecovery:
    """Recovery of one layer's steps from now on.

    The policy works unchanged; a step is measured after the policy has observed it. The layer must have been prefilled,
    and no sequences may be added afterwards.

    Args:
        layer: A layer of a prefilled cache.
        interval: Steps from one measurement to the next.

    Attributes:
        share_BG: fp32, share of the true mass on attended blocks, summed over measured steps.
        relative_BG: fp32, its ratio to the best selection for the layer's budget, summed.
        measured: How many steps that was.
        maps_GN: uint8, for each measured step the codes (``codes_of``) of the first sequence's blocks; N grows. Empty
            unless asked for.
    """

    def __init__(self, layer: TieredLayer, interval: int, *, mapped: bool = False) -> None:
        self.layer, self.interval, self.mapped = layer, interval, mapped
        self.maps_GN: list[Tensor] = []
        self.steps = self.measured = 0
        self.share_BG = torch.zeros(layer.batch, layer.kv_heads, device=layer.device)
        self.relative_BG = torch.zeros_like(self.share_BG)
        self._observe = layer.policy.observe
        layer.policy.observe = self.observe  # type: ignore[method-assign]

    def observe(self, step: Step) -> None:
        """Replaces the policy's ``observe``."""
        self._observe(step)
        self.steps += 1
        if self.steps % self.interval == 0:
            self._measure(step)

    def _measure(self, step: Step) -> None:
        found, n_blocks = measure(step, self.layer.selection), step.blocks
        self.share_BG += found.recovery.share
        self.relative_BG += found.recovery.relative
        self.measured += 1
        if self.mapped:
            first = (found.mass_BGC[0], step.attended_BGC[0], found.best_BGC[0])
            self.maps_GN.append(codes_of(*(x_GC[:, :n_blocks] for x_GC in first)).cpu())

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """Share and relative recovery ``[B, G]`` of a step, on average."""
        return self.share_BG / self.measured, self.relative_BG / self.measured


def measure_heads(cache: Cache, interval: int, *, mapped: bool = False) -> dict[int, HeadRecovery]:
    """Measure every offloaded layer of a cache, by layer number."""
    layers = [layer for layer in cache.layers if isinstance(layer, TieredLayer)]
    return {layer.number: HeadRecovery(layer, interval, mapped=mapped) for layer in layers}


def check_measurable(variant: Variant) -> None:
    """Raise ``ConfigError`` for a variant that attends to everything, or whose steps are captured."""
    if variant.config is None or policy_class(variant.config.policy).selects == "all":
        raise ConfigError(f"policy {variant.policy!r} attends to everything, so it has no recovery to measure")
    if (prefetch := variant.config.prefetch) in CAPTURING:
        raise ConfigError(
            f"{variant.name}: captured steps can't be measured: set prefetch to thread or none, not {prefetch!r}"
        )
