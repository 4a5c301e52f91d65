"""How layers share the total budget: equally, by a fixed form, as configured, or by statistics of the prompt.

- ``uniform``: each layer has the configured budget.
- ``pyramid`` (PyramidKV, arXiv 2406.02069, section 4): budgets fall by the same step from layer to layer; the top layer
  has 1/20 of the mean.
- ``qsim`` (TAPPA, ICLR 2026, arXiv 2601.21709): a layer's weight is 1 − q, where q is the similarity of its last 32
  prompt queries (``query_similarity``), averaged over heads. Layers whose queries change keep more.
- ``cake`` (CAKE, ICLR 2025, arXiv 2503.12491): the weight comes from entropy and variance of the attention of the last
  32 prompt queries over the blocks before them (``policies/cake.py``, ``preference``).
- ``qsim-heads``, ``cake-heads``: the same for each KV head; all heads of all layers share one total.
- a list of budgets in tokens: one per layer, or one per KV head of each layer.

Adapted: every layer or head has sink, recent and one block; only the rest of the total is shared by weight
(``share_budget``). The papers share everything but a window. A layer's budget beyond the context is not used;
PyramidKV's authors give it to upper layers, but these budgets hold for contexts that grow. A layer's pool has the same
number of slots for each KV head: as many as its largest budget needs. A batch has one set of budgets, from the mean of
its sequences' shares. Prompt statistics are complete after the last layer, so no layer fetches before. Every forward of
at least 32 tokens sets the budgets anew; shorter ones, such as drafts, do not.

Suffixes: B sequences, G KV heads, H query heads, Q queries, T tokens, L tokens of the sequence, D head size, N blocks,
F statistics, Y layers, or the KV heads of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from attention_predictor.errors import ConfigError
from attention_predictor.offload.attention.dense import ScoreRows
from attention_predictor.offload.blocks.selection import Budget
from attention_predictor.offload.policies import policy_class
from attention_predictor.offload.policies.cake import entropy_and_shift, preference
from attention_predictor.offload.policies.query_similarity import WINDOW, query_similarity
from attention_predictor.offload.ranks import Ranks

if TYPE_CHECKING:
    from attention_predictor.offload.blocks.layer_blocks import LayerBlocks
    from attention_predictor.offload.config import OffloadConfig

PYRAMID_BETA = 20
BY_HEAD = "-heads"
FROM_PROMPT = ("qsim", "cake", "qsim" + BY_HEAD, "cake" + BY_HEAD)


def share_budget(config: OffloadConfig, weights: Sequence[float]) -> list[int]:
    """Budgets in tokens, one per weight (a layer or a KV head); their sum is that of equal budgets, in whole blocks.

    Each gets sink, recent and one block. The rest of the sum is shared by weight and rounded to blocks: the largest
    fractions are rounded up, ties in favour of lower layers. If all weights are zero, they count as equal.
    """
    least = (config.sink + config.recent) // config.block_size + 1
    free = len(weights) * (config.budget // config.block_size - least)
    total = sum(weights)
    exact = [free * (weight / total if total else 1 / len(weights)) for weight in weights]
    blocks = [int(share) for share in exact]
    by_fraction = sorted(range(len(weights)), key=lambda layer: blocks[layer] - exact[layer])
    for layer in by_fraction[: free - sum(blocks)]:
        blocks[layer] += 1
    return [(least + more) * config.block_size for more in blocks]


def first_budgets(config: OffloadConfig, layers: int, kv_heads: int | None = None) -> list[Budget]:
    """The layers' budgets before any prompt; ``ConfigError`` where configured budgets don't fit the model, or the
    policy names an allocation that doesn't exist.

    ``kv_heads`` are those of the whole model, and so are budgets by head.
    """
    kind = allocation_of(config)
    if not isinstance(kind, str):
        if len(kind) != layers:
            raise ConfigError(f"budget_allocation has {len(kind)} budgets: the model has {layers} layers to offload")
        budgets: list[Budget] = [one if isinstance(one, int) else tuple(one) for one in kind]
        for one in budgets:
            if isinstance(one, tuple) and kv_heads not in (None, len(one)):
                raise ConfigError(f"budget_allocation has {len(one)} budgets in a layer: it has {kv_heads} KV heads")
        return budgets
    if kind == "pyramid":
        top, bottom = 1 / PYRAMID_BETA, 2 - 1 / PYRAMID_BETA
        fall = (bottom - top) / max(layers - 1, 1)
        return [*share_budget(config, [bottom - layer * fall for layer in range(layers)])]
    if kind == "uniform" or kind in FROM_PROMPT:  # the prompt changes them later
        return [config.budget] * layers
    allowed = ", ".join(("uniform", "pyramid", *FROM_PROMPT))
    raise ConfigError(f"the allocation of policy {config.policy!r} is {kind!r}: expected one of {allowed}")


def allocation_of(config: OffloadConfig) -> str | Sequence[int | Sequence[int]]:
    """``config.budget_allocation``, with ``"policy"`` replaced by the allocation of the policy's paper."""
    policy = policy_class(config.policy)
    return policy.allocation if config.budget_allocation == "policy" else config.budget_allocation


class AllocatedLayer(Protocol):
    """What the allocation needs of a layer."""

    number: int
    batch: int
    kv_heads: int
    block_size: int
    blocks: LayerBlocks

    def set_budget(self, budget: Budget) -> None:
        """Attend to ``budget`` tokens from the next step on; budgets by head are those of all ranks' KV heads."""
        ...


class PromptAllocation:
    """Budgets that the prompt decides, for the layers of one cache. Each layer records its statistics; the last layer's
    call sets all budgets. They are those of the whole model, on every rank that has a part of it.

    Attributes:
        rows: How many of the last queries' score rows a layer has to pass to ``record``.
    """

    def __init__(self, config: OffloadConfig, layers: Sequence[int], ranks: Ranks) -> None:
        kind = allocation_of(config)
        assert isinstance(kind, str)
        self.config, self.layers, self.ranks = config, sorted(layers), ranks
        self.by_queries, self.by_head = kind.startswith("qsim"), kind.endswith(BY_HEAD)
        self.rows = 0 if self.by_queries else WINDOW
        self.recorded: dict[int, tuple[AllocatedLayer, Tensor]] = {}

    @classmethod
    def of(cls, config: OffloadConfig, layers: Sequence[int], ranks: Ranks) -> PromptAllocation | None:
        """``None`` where budgets don't depend on the prompt."""
        if allocation_of(config) not in FROM_PROMPT or policy_class(config.policy).selects == "all":
            return None
        return cls(config, layers, ranks)

    def applies_to(self, queries: int, length: int) -> bool:
        """Whether a forward of ``queries`` tokens sets budgets; ``length`` is the cache's length including them."""
        return queries >= WINDOW or 1 < queries == length

    def record(self, layer: AllocatedLayer, query_BHQD: Tensor, rows: ScoreRows | None, real_BL: Tensor | None) -> None:
        """Record this layer's statistics; the last layer's call sets all budgets.

        Args:
            query_BHQD: Queries of this forward: the prompt, or a chunk of it.
            rows: Score rows of at least the last ``self.rows`` queries; ``None`` if ``self.rows`` is 0.
            real_BL: bool, False at padding; ``None`` where there is none.
        """
        if layer.number == self.layers[0]:
            self.recorded = {}  # drop records of an interrupted forward
        self.recorded[layer.number] = layer, self._statistics(layer, query_BHQD, rows, real_BL)
        if layer.number == self.layers[-1]:
            # Emptied first: a reference cycle of layer and allocation would keep the cache's memory alive.
            recorded, self.recorded = self.recorded, {}
            every_BGF = self.ranks.gather_heads([own_BGF for _, own_BGF in recorded.values()])
            device = every_BGF[-1].device  # layers may be on several
            preferences_BY = [self._preference(one_BGF).to(device) for one_BGF in every_BGF]
            budgets = iter(share_budget(self.config, mean_shares(torch.cat(preferences_BY, 1).T)))
            for (one, _), preference_BY in zip(recorded.values(), preferences_BY, strict=True):
                found = tuple(islice(budgets, preference_BY.shape[1]))
                one.set_budget(found if self.by_head else found[0])

    def _statistics(
        self, layer: AllocatedLayer, query_BHQD: Tensor, rows: ScoreRows | None, real_BL: Tensor | None
    ) -> Tensor:
        """What the preference is made of, by KV head: fp32 ``[B, G, F]``; NaN for a sequence with too few queries."""
        if self.by_queries:
            last_BHTD = query_BHQD[:, :, -WINDOW:]
            real_BT = None if real_BL is None else real_BL[:, -last_BHTD.shape[2] :]
            turn_BH = 1 - query_similarity(last_BHTD, real_BT)
            return turn_BH.unflatten(1, (layer.kv_heads, -1)).mean(2)[..., None]
        assert rows is not None  # ``self.rows`` > 0, so the layer computed them
        mass_BGQN = rows.mass_BGQN[:, :, -WINDOW:]
        before = (layer.blocks.length - mass_BGQN.shape[2]) // layer.block_size  # whole blocks before the window
        if not before:
            return mass_BGQN.new_zeros(layer.batch, layer.kv_heads, 2)
        return entropy_and_shift(mass_BGQN[..., :before])

    def _preference(self, every_BGF: Tensor) -> Tensor:
        """fp32 ``[B, 1]``, or ``[B, G]`` by KV head."""
        parts = every_BGF.split(1, 1) if self.by_head else [every_BGF]
        if self.by_queries:
            return torch.cat([part_BGF.mean(1) for part_BGF in parts], 1).clamp_min(0)
        return torch.stack([preference(part_BGF) for part_BGF in parts], 1)


def mean_shares(preference_YB: Tensor) -> list[float]:
    """Each layer's (or head's) share of the total, averaged over sequences; zeros if all preferences are zero."""
    share_YB = preference_YB / preference_YB.sum(0)
    return share_YB.nanmean(1).nan_to_num(0).tolist()
