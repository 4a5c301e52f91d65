"""The attention map of one layer's last steps: computed chunk by chunk after the layer attended, then classified.

Only its score rows (steps × blocks) and one chunk (steps × some tokens) are in memory at a time.

Suffixes: B sequences, G KV heads, H query heads, Q steps, N blocks, T tokens, P pairs of channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attention_predictor.eval.analysis import examples
from attention_predictor.eval.analysis.channels import ChannelSums
from attention_predictor.eval.analysis.examples import Example, Image
from attention_predictor.eval.analysis.observed_attention import Attended
from attention_predictor.eval.analysis.patterns import MapSums, Measures, Part
from attention_predictor.eval.analysis.predictability import Foreseen
from attention_predictor.offload.attention.dense import Scorer, ScoreRows, total_of
from attention_predictor.offload.blocks.selection import Selection


class LayerMap:
    """Classifies a layer's attention map.

    Attributes:
        rows: Scores and mass by block, of every query head.
        measures: Figures by sequence and query head.
        channels_BHP: Parts in logits (``channels.py``); ``None`` without a rotation.
    """

    def __init__(self, attended: Attended, selection: Selection) -> None:
        self.attended = attended
        scorer = head_scorer(attended)
        self.total_BHQ1 = total_of(scorer.sum_BHQN, attended.terms)
        self.rows = scorer.rows()  # uses the scorer up
        self.part = part = Part(self.rows.mass_BGQN, attended.length, selection)
        sums = MapSums(part)
        channels = ChannelSums(part, attended.layer.kv_heads, attended.query_BHQD.shape[-1])
        for chunk in attended.chunks():
            prob_BHQT = part.cut(chunk.start, attended.probabilities(chunk.start, chunk.key_BGTD, self.total_BHQ1))
            sums.add(chunk.start, prob_BHQT)
            channels.add(chunk.start, chunk.key_BGTD, prob_BHQT)
        self.measures: list[list[Measures]] = sums.measures()
        self.channels_BHP: Tensor | None = None
        if attended.rotation is not None:
            self.channels_BHP = channels.by_pair(attended.query_BHQD, attended.terms.scaling, attended.rotation)

    def example(self, row: Mapping[str, Any], foreseen: Foreseen) -> Example:
        """The map of the sequence and head that a row of the table is about, with what was chosen of it."""
        attended, layer = self.attended, self.attended.layer
        sequence, head, kv_head = row["sequence"], row["head"], row["kv_head"]
        whole_QC, each = examples.pooled(self.rows.mass_BGQN[sequence, head])
        kind_QN = examples.choices(foreseen.chosen_BGQN[sequence, kv_head], foreseen.best_BGQN[sequence, kv_head])
        first = examples.busiest(self.part.mass_BHQN[sequence, head].sum(0)) * layer.block_size
        end = min(first + examples.ZOOMED * layer.block_size, attended.length)
        key_BGTD = layer.blocks.store.read(first, end)[0].to(layer.device)
        near_BHQT = attended.probabilities(first, key_BGTD, self.total_BHQ1)
        return Example(
            head=dict(row),
            whole=Image.of(examples.grey(whole_QC)),
            choice=Image.of(examples.pooled(kind_QN)[0]),
            near=Image.of(examples.grey(near_BHQT[sequence, head])),
            first_token=first,
            blocks_a_column=each,
            first_step=attended.length - attended.query_BHQD.shape[2] + 1,
        )


def head_scorer(attended: Attended) -> Scorer:
    """Rows of every query head over all keys."""
    heads = attended.query_BHQD.shape[1]
    scorer = Scorer(
        attended.query_BHQD,
        attended.length,
        attended.terms,
        kv_heads=heads,  # a row for each query head, none pooled
        block_size=attended.layer.block_size,
    )
    for chunk in attended.chunks():
        scorer.add(chunk)
    return scorer


def pooled(rows: ScoreRows, kv_heads: int) -> ScoreRows:
    """Rows of KV heads: the largest score and the mean mass of their query heads (``predictor/scores.py``)."""
    groups = (kv_heads, -1)
    return ScoreRows(rows.scores_BGQN.unflatten(1, groups).amax(2), rows.mass_BGQN.unflatten(1, groups).mean(2))
