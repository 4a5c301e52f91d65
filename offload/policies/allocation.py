"""How layers share the budget: equally, by a form, as given, or by what the prompt shows of each of them.

- ``uniform``: each layer has the configured budget.
- ``pyramid`` (PyramidKV, arXiv 2406.02069, section 4): budgets fall by the same step from layer to layer, the top layer
  having 1/20 of the mean.
- ``qsim`` (TAPPA, ICLR 2026, arXiv 2601.21709): a layer's preference for room is 1 − q, q being the similarity of its
  last 32 prompt queries (``query_similarity``), averaged over heads. Where queries turn, more is kept.
- ``cake`` (CAKE, ICLR 2025, arXiv 2503.12491): by entropy and variance of the attention of the last 32 prompt queries
  over what stands before them (``policies/cake.py``, ``preference``).
- ``qsim-heads``, ``cake-heads``: the same for each KV head by itself, all heads of all layers sharing one total.
- budgets in tokens, one a layer, or one for each of its KV heads.

Adapted: layers, or heads, have sink, recent and one block in any case, and what is left of the total goes in proportion
(``share_budget``); the papers give all of it so, but for a window. What a layer has beyond the context is not used;
PyramidKV's authors give it to upper layers, but these budgets hold for contexts that grow. A layer's pool has as many
slots for each KV head, as many as the largest budget among them asks for. A batch has one set of budgets, from the mean
of its sequences' shares. What the prompt decides is known when it has gone through the last layer: no layer fetches
before. It is decided anew by every forward of 32 tokens and more; shorter ones, such as drafts, leave it alone.

Suffixes: B sequences, G KV heads, H query heads, Q queries, T tokens, L tokens of the sequence, D head size, N blocks,
Y layers, or the KV heads of all layers.
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
from attention_predictor.offload.policies.cake import preference
from attention_predictor.offload.policies.query_similarity import WINDOW, query_similarity

if TYPE_CHECKING:
    from attention_predictor.offload.blocks.layer_blocks import LayerBlocks
    from attention_predictor.offload.config import OffloadConfig

PYRAMID_BETA = 20
BY_HEAD = "-heads"
FROM_PROMPT = ("qsim", "cake", "qsim" + BY_HEAD, "cake" + BY_HEAD)


def share_budget(config: OffloadConfig, weights: Sequence[float]) -> list[int]:
    """Budgets of layers, or of KV heads, in tokens, their sum exactly that of equal ones (in whole blocks).

    Each gets sink, recent and one block; what is left of the sum goes by weight, rounded to blocks so that the largest
    fractions are rounded up, and of equal ones those of the lower layers. Weights of zero alone are equal weights.
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
    """The budgets of so many layers before any prompt; ``ConfigError`` where those given don't fit the model."""
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
    return [config.budget] * layers


def allocation_of(config: OffloadConfig) -> str | Sequence[int | Sequence[int]]:
    """What ``config.budget_allocation`` comes to, ``"policy"`` being what the policy's paper has."""
    policy = policy_class(config.policy)
    return policy.allocation if config.budget_allocation == "policy" else config.budget_allocation


class Sharer(Protocol):
    """A layer that takes part."""

    number: int
    batch: int
    kv_heads: int
    block_size: int
    blocks: LayerBlocks

    def set_budget(self, budget: Budget) -> None:
        """Attend to so many tokens from the next step on."""
        ...


class Sharing:
    """How the layers of one cache come to budgets that their prompt decides: each tells, the last one shares.

    Attributes:
        rows: Score rows of the last queries that a layer is to show.
    """

    def __init__(self, config: OffloadConfig, layers: Sequence[int]) -> None:
        kind = allocation_of(config)
        assert isinstance(kind, str)
        self.config, self.layers = config, sorted(layers)
        self.by_queries, self.by_head = kind.startswith("qsim"), kind.endswith(BY_HEAD)
        self.rows = 0 if self.by_queries else WINDOW
        self.told: dict[int, tuple[Sharer, Tensor]] = {}

    @classmethod
    def of(cls, config: OffloadConfig, layers: Sequence[int]) -> Sharing | None:
        """``None`` where budgets don't depend on the prompt."""
        if allocation_of(config) not in FROM_PROMPT or policy_class(config.policy).selects == "all":
            return None
        return cls(config, layers)

    def heeds(self, queries: int, length: int) -> bool:
        """Whether a forward of so many queries, at ``length`` tokens with them, decides about budgets."""
        return queries >= WINDOW or 1 < queries == length

    def tell(self, layer: Sharer, query_BHQD: Tensor, rows: ScoreRows | None, real_BL: Tensor | None) -> None:
        """What a layer shows of itself; the last one's word sets the budgets of all of them.

        Args:
            query_BHQD: Of the prompt, or of as much of it as has gone through the layer now.
            rows: Of the last ``self.rows`` of them, or of more; ``None`` if none are wanted.
            real_BL: bool, False at padding; ``None`` where there is none.
        """
        if layer.number == self.layers[0]:
            self.told = {}  # what is left of a forward that was interrupted
        self.told[layer.number] = layer, self._preference(layer, query_BHQD, rows, real_BL)
        if layer.number == self.layers[-1]:
            # Emptied before anything else: a cycle of layer and sharing would keep the cache's memory.
            told, self.told = self.told, {}
            preference_YB = torch.cat([preference_BY.T for _, preference_BY in told.values()])
            budgets = iter(share_budget(self.config, mean_shares(preference_YB)))
            for one, preference_BY in told.values():
                own = tuple(islice(budgets, preference_BY.shape[1]))
                one.set_budget(own if self.by_head else own[0])

    def _preference(self, layer: Sharer, query_BHQD: Tensor, rows: ScoreRows | None, real_BL: Tensor | None) -> Tensor:
        """fp32 ``[B, 1]``, or ``[B, G]`` by KV head; NaN for a sequence that shows nothing."""
        parts = layer.kv_heads if self.by_head else 1
        if self.by_queries:
            last_BHTD = query_BHQD[:, :, -WINDOW:]
            real_BT = None if real_BL is None else real_BL[:, -last_BHTD.shape[2] :]
            return (1 - query_similarity(last_BHTD, real_BT).unflatten(1, (parts, -1)).mean(2)).clamp_min(0)
        assert rows is not None  # the layer has been asked for them
        mass_BGQN = rows.mass_BGQN[:, :, -WINDOW:]
        before = (layer.blocks.length - mass_BGQN.shape[2]) // layer.block_size  # whole blocks before the window
        if not before:
            return mass_BGQN.new_zeros(layer.batch, parts)
        return torch.stack([preference(part) for part in mass_BGQN[..., :before].chunk(parts, 1)], 1)


def mean_shares(preference_YB: Tensor) -> list[float]:
    """Shares of the layers or heads, from preferences of each sequence; zeros, if no sequence prefers anything."""
    share_YB = preference_YB / preference_YB.sum(0)
    return share_YB.nanmean(1).nan_to_num(0).tolist()
