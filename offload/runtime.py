"""Runtime: what all caches of one engine share. Layers refer to it, not to the engine or the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from attention_predictor.errors import AttachError
from attention_predictor.offload.blocks.host_memory import HostMemory
from attention_predictor.offload.blocks.room import Room
from attention_predictor.offload.blocks.selection import Budget
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.ranks import Ranks
from attention_predictor.offload.stage import Stage
from attention_predictor.offload.stats import Stats

logger = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class Runtime:
    """Settings, figures, host memory and the stages of an engine.

    Attributes:
        text_config: The configuration of the model's language model.
        device: Where the model takes its inputs and gives its logits.
        stage_of: The stage of each tiered layer, by number.
        layers: Number of layers of the language model, tiered or not.
        first_budgets: Budget of each tiered layer before any prompt; by head, those of all ranks' KV heads.
        ranks: The processes among which the model is divided.
        stats: Figures so far; counts of later steps are still on the devices (``Stage.counts``).
        open: False once the engine is detached.
    """

    config: OffloadConfig
    text_config: PreTrainedConfig
    device: torch.device
    stage_of: Mapping[int, Stage]
    layers: int
    first_budgets: Mapping[int, Budget]
    ranks: Ranks
    room: Room
    stats: Stats
    open: bool = False

    @property
    def tiered_layers(self) -> frozenset[int]:
        """Numbers of the layers whose cache is in host memory."""
        return frozenset(self.first_budgets)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that have tiered layers, in the order of their layers."""
        return tuple(dict.fromkeys(self.stage_of[number] for number in sorted(self.stage_of)))

    @property
    def memory(self) -> HostMemory:
        """The host memory that caches borrow slabs from."""
        return self.room.memory

    def check_open(self) -> None:
        """Raise ``AttachError`` if the engine is detached."""
        if not self.open:
            raise AttachError("this engine is detached from its model; call attach again")

    def is_first(self, number: int) -> bool:
        """Whether this is the first tiered layer, which counts the steps."""
        return number == min(self.first_budgets)

    def note_fallback(self, message: str) -> None:
        """Record that something runs differently from the settings: logged once, counted in ``stats.fallbacks``."""
        if message not in self.stats.fallbacks:
            logger.warning(message)
        self.stats.fallbacks[message] += 1

    def drain(self) -> None:
        """Return when no fetch is in progress."""
        for stage in self.stages:
            stage.prefetcher.drain()

    def close(self) -> None:
        """Stop the prefetchers; return free host memory now and the rest as caches die."""
        for stage in self.stages:
            stage.prefetcher.close()
        self.memory.close()

    def __deepcopy__(self, memo: dict) -> Runtime:
        return self  # a copied cache belongs to the same engine
