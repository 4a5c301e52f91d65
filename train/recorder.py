"""Records one document with one of two policies: one attends to everything, one decodes as the predictor policy does.

Suffixes: B sequences, G KV heads, H query heads, Q queries, N blocks, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attention_predictor.documents import Excerpt
from attention_predictor.errors import ConfigError
from attention_predictor.offload.attention.dense import ScoreRows
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.engine import Engine
from attention_predictor.offload.hf.attach import attach
from attention_predictor.offload.hf.layer import TieredLayer
from attention_predictor.offload.hf.placement import input_device
from attention_predictor.offload.hf.versions import with_cache
from attention_predictor.offload.policies import LayerSpec, Policy, Step, register
from attention_predictor.offload.policies.predictor import PredictorPolicy
from attention_predictor.offload.ranks import Ranks
from attention_predictor.predictor.base import PROMPT_ROWS
from attention_predictor.train.shards import Record

SEQUENCES = 16  # decoded at once; each needs memory in proportion to the prompt


@register
class FullRecorder(Policy):
    """Attends to everything and keeps the score rows: of the prompt's last queries, then of every step."""

    name = "record-full"
    selects = "all"

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.prompt_rows = PROMPT_ROWS
        self.rows: list[ScoreRows] = []

    def observe_rows(self, rows: ScoreRows) -> None:
        self.rows.append(rows)
        self.prompt_rows = self.spec.config.history

    def index(self, batch_index: Tensor) -> None:
        self.rows = [_indexed(rows, batch_index) for rows in self.rows]

    def shown(self) -> ScoreRows:
        return _joined(self.rows)


@register
class SparseRecorder(PredictorPolicy):
    """Decodes as the predictor policy does; keeps the rows that its history observes, and the true mass."""

    name = "record-sparse"

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        self.prompt_rows = PROMPT_ROWS  # also if the selecting rule uses fewer
        self.prompt: list[ScoreRows] = []
        self.observed: list[Tensor] = []
        self.queries: list[Tensor] = []
        self.last: Step | None = None

    def observe_rows(self, rows: ScoreRows) -> None:
        super().observe_rows(rows)
        self.prompt.append(rows)

    def observe(self, step: Step) -> None:
        super().observe(step)
        row_BGN = self.row(step)[..., : step.blocks]
        self.observed.append(row_BGN[:, :, None])
        self.queries.append(step.query_BHD[:, :, None])
        self.last = step

    def index(self, batch_index: Tensor) -> None:
        super().index(batch_index)
        self.prompt = [_indexed(rows, batch_index) for rows in self.prompt]
        self.observed, self.queries = ([one[batch_index] for one in kept] for kept in (self.observed, self.queries))

    def shown(self) -> ScoreRows:
        if self.last is None:
            return _joined(self.prompt)
        # One pass over the keys in host memory gives the true rows of all steps.
        truth = self.last.true_rows(torch.cat(self.queries, dim=2))
        return _joined([*self.prompt, ScoreRows(_padded(self.observed), truth.mass_BGQN)])


def attach_recorder(model: PreTrainedModel, config: OffloadConfig) -> Engine:
    """Attach one of the two recording policies; AttachError or ConfigError if there is nothing to record."""
    engine = attach(model, config)
    if not engine.tiered_layers:
        engine.detach()
        raise ConfigError(f"{type(model).__name__} has no full-attention layer to record")
    return engine


@torch.no_grad()
def record(model: PreTrainedModel, excerpt: Excerpt, config: OffloadConfig) -> Iterator[Record]:
    """Record an excerpt with one of the two recording policies.

    A record holds the prompt's last ``PROMPT_ROWS`` rows and those of one tail. With ``FullRecorder``, ``history`` must
    be at least a tail's length. Many tails are taken ``SEQUENCES`` at a time, with a prefill each.

    Raises:
        ConfigError: The model has no full-attention layer.
    """
    with attach_recorder(model, config) as engine:
        for first in range(0, len(excerpt.tails), SEQUENCES):
            part = Excerpt(excerpt.prompt, excerpt.tails[first : first + SEQUENCES])
            yield from _decoded(model, engine, part, first)


def _decoded(model: PreTrainedModel, engine: Engine, excerpt: Excerpt, first: int) -> Iterator[Record]:
    """Records of tails decoded together; sequence numbers start at ``first``."""
    cache = engine.new_cache()
    model(torch.tensor([excerpt.prompt], device=input_device(model)), **with_cache(model, cache), logits_to_keep=1)
    tails_BQ = torch.tensor(excerpt.tails, device=input_device(model))
    cache.batch_repeat_interleave(len(excerpt.tails))
    for part_BQ in tails_BQ.split(1 if engine.config.policy == SparseRecorder.name else tails_BQ.shape[1], dim=1):
        model(part_BQ, **with_cache(model, cache), logits_to_keep=1)
    for layer in cache.layers:
        if not isinstance(layer, TieredLayer):
            continue
        assert isinstance(layer.policy, FullRecorder | SparseRecorder)
        shown = _of_all_ranks(layer.policy.shown(), layer.runtime.ranks)
        for sequence in range(layer.batch):
            for head in range(shown.scores_BGQN.shape[1]):
                yield Record(
                    sequence=first + sequence,
                    layer=layer.number,
                    head=head,
                    first_tokens=len(excerpt.prompt) - PROMPT_ROWS + 1,
                    scores_QN=shown.scores_BGQN[sequence, head],
                    mass_QN=shown.mass_BGQN[sequence, head],
                )


def _of_all_ranks(rows: ScoreRows, ranks: Ranks) -> ScoreRows:
    """The rows of all KV heads of the model, of which each rank has recorded its own."""
    found = ranks.gather_heads([rows_BGQN.flatten(2) for rows_BGQN in rows])
    return ScoreRows(*(every_BGF.unflatten(2, rows.mass_BGQN.shape[2:]) for every_BGF in found))


def _indexed(rows: ScoreRows, batch_index: Tensor) -> ScoreRows:
    return ScoreRows(rows.scores_BGQN[batch_index], rows.mass_BGQN[batch_index])


def _joined(rows: list[ScoreRows]) -> ScoreRows:
    return ScoreRows(_padded([one.scores_BGQN for one in rows]), _padded([one.mass_BGQN for one in rows]))


def _padded(rows: list[Tensor]) -> Tensor:
    """Concatenated rows, with zeros for blocks that did not exist yet."""
    blocks = rows[-1].shape[-1]
    return torch.cat([torch.nn.functional.pad(part, (0, blocks - part.shape[-1])) for part in rows], dim=-2)
