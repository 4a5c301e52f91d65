"""Stage: what the layers that compute on one device share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attention_predictor.offload.blocks.prefetch import Prefetcher
from attention_predictor.offload.stats import DeviceCounts
from attention_predictor.predictor.model import AttentionPredictor


@dataclass(eq=False, kw_only=True)
class Stage:
    """The layers of a model on one device; a model on one device has one stage.

    Attributes:
        predictor: Its weights are on the device; ``None`` for policies without one.
        prefetcher: Fetches blocks to the device.
        counts: Counts of these layers' steps, kept on the device.
    """

    device: torch.device
    predictor: AttentionPredictor | None
    prefetcher: Prefetcher
    counts: DeviceCounts

    def __deepcopy__(self, memo: dict) -> Stage:
        return self  # a copied cache computes on the same devices
