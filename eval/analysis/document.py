"""Analyses one document: one pass over prompt and steps, figures of every layer and head.

Of each layer only figures, the predictors' states between prompt and steps, and the clearest maps so far are kept in
memory: for each pattern one classified beyond sink and recent, and one classified as a whole.

Suffixes: B sequences, G KV heads, H query heads, Q steps, N blocks, R prompt rows, T tokens, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from attention_predictor.documents import Excerpt
from attention_predictor.eval.analysis.examples import Example
from attention_predictor.eval.analysis.layer_map import LayerMap, head_scorer, pooled
from attention_predictor.eval.analysis.observed_attention import Attended, watching
from attention_predictor.eval.analysis.predictability import Foreseen, Predictability
from attention_predictor.eval.analysis.qsim import over_windows
from attention_predictor.offload.attention.dense import ScoreRows
from attention_predictor.offload.blocks.selection import Selection
from attention_predictor.offload.engine import Engine
from attention_predictor.offload.hf.versions import with_cache
from attention_predictor.offload.policies.query_similarity import query_similarity
from attention_predictor.predictor.base import PROMPT_ROWS, AttentionPredictor

DIGITS = 6


@dataclass(frozen=True)
class AnalysisSettings:
    """Predictors and settings of the analysis.

    Attributes:
        predictors: Predictors by name; the gallery shows the first one's choices.
        selection: Budget, sink and recent of a choice.
        window: Tokens over which query similarity is taken.
    """

    predictors: Mapping[str, AttentionPredictor]
    selection: Selection
    window: int


@torch.no_grad()
def analyse(engine: Engine, excerpt: Excerpt, settings: AnalysisSettings) -> dict[str, Any]:
    """Figures of every offloaded layer and query head over an excerpt; the engine must attend to everything.

    Returns:
        ``rows``, one for each tail, layer and query head; ``wavelengths`` of the pairs of channels by layer, in tokens;
        ``examples``, the clearest maps of each pattern.
    """
    model, cache, found = engine.model, engine.new_cache(), _Findings(settings)
    with watching(model, cache, found.see_prompt):
        model(torch.tensor([excerpt.prompt], device=model.device), **with_cache(model, cache), logits_to_keep=1)
    cache.batch_repeat_interleave(len(excerpt.tails))
    with watching(model, cache, found.see_steps):
        model(torch.tensor(excerpt.tails, device=model.device), **with_cache(model, cache), logits_to_keep=1)
    return {
        "rows": found.rows,
        "wavelengths": {str(layer): values for layer, values in found.wavelengths.items()},
        "examples": [example.to_dict() for _, example in found.clearest.values()],
    }


@dataclass(frozen=True)
class _Prompt:
    """Figures of a layer after the prompt."""

    similarity_H: list[float]
    plain_H: list[float | None]
    foresights: dict[str, Predictability]  # by KV head
    head_foresights: dict[str, Predictability]  # by query head


class _Findings:
    """Figures so far by layer: of the prompt, then of the steps."""

    def __init__(self, settings: AnalysisSettings) -> None:
        self.settings = settings
        self.prompts: dict[int, _Prompt] = {}
        self.rows: list[dict[str, Any]] = []
        self.wavelengths: dict[int, list[float | None]] = {}
        self.clearest: dict[tuple[str, str], tuple[float, Example]] = {}  # by pattern and part

    def see_prompt(self, attended: Attended) -> None:
        last = attended.last(self.settings.window)
        rows = head_scorer(attended.last(PROMPT_ROWS)).rows()
        grouped = pooled(rows, attended.layer.kv_heads)
        predictors = self.settings.predictors
        plain_BHTD = last.plain_BHQD
        self.prompts[attended.number] = _Prompt(
            similarity_H=query_similarity(last.query_BHQD)[0].tolist(),
            plain_H=_unknown(last)[0] if plain_BHTD is None else query_similarity(plain_BHTD)[0].tolist(),
            foresights={name: Predictability(one, grouped.scores_BGQN) for name, one in predictors.items()},
            head_foresights={name: Predictability(one, rows.scores_BGQN) for name, one in predictors.items()},
        )

    def see_steps(self, attended: Attended) -> None:
        prompt, window = self.prompts.pop(attended.number), self.settings.window
        shown = LayerMap(attended, self.settings.selection)
        foreseen = self._foreseen(prompt.foresights, attended, pooled(shown.rows, attended.layer.kv_heads))
        by_head = self._foreseen(prompt.head_foresights, attended, shown.rows)
        plain_BHQD = attended.plain_BHQD
        similarity_BH = over_windows(attended.query_BHQD, window).tolist()
        plain_BH = _unknown(attended) if plain_BHQD is None else over_windows(plain_BHQD, window).tolist()
        channels_BHP = None if shown.channels_BHP is None else shown.channels_BHP.tolist()
        if attended.rotation is not None:
            self.wavelengths[attended.number] = list(map(_rounded, attended.rotation.wavelengths))
        for sequence, of_heads in enumerate(shown.measures):
            for head, measures in enumerate(of_heads):
                kv_head = head * attended.layer.kv_heads // len(of_heads)
                row: dict[str, Any] = {"sequence": sequence, "layer": attended.number, "head": head, "kv_head": kv_head}
                row |= {"qsim_prompt": prompt.similarity_H[head], "qsim_prompt_plain": prompt.plain_H[head]}
                row |= {"qsim_steps": similarity_BH[sequence][head], "qsim_steps_plain": plain_BH[sequence][head]}
                row |= _recoveries(foreseen, sequence, kv_head) | _recoveries(by_head, sequence, head, "_head")
                row |= asdict(measures) | {"pattern": measures.pattern, "clarity": measures.clarity}
                row["period"], row["period_unit"] = measures.period or (None, None)
                row = {name: _rounded(value) if isinstance(value, float) else value for name, value in row.items()}
                channels = None if channels_BHP is None else list(map(_rounded, channels_BHP[sequence][head]))
                self.rows.append(row | {"channels": channels})
                kind = (measures.pattern, measures.part)
                if kind not in self.clearest or measures.clarity > self.clearest[kind][0]:
                    example = shown.example(self.rows[-1], next(iter(foreseen.values())))
                    self.clearest[kind] = (measures.clarity, example)

    def _foreseen(
        self, foresights: Mapping[str, Predictability], attended: Attended, rows: ScoreRows
    ) -> dict[str, Foreseen]:
        found = {}
        for name, foresight in foresights.items():
            foresight.repeat(len(attended.query_BHQD))
            found[name] = foresight.over(rows, attended.length, self.settings.selection)
        return found


def _recoveries(foreseen: Mapping[str, Foreseen], sequence: int, head: int, suffix: str = "") -> dict[str, float]:
    found = {}
    for name, one in foreseen.items():
        for what, value_BG in (("share", one.share_BG), ("relative", one.relative_BG), ("far", one.far_BG)):
            found[f"{name}_{what}{suffix}"] = float(value_BG[sequence, head])
    return found


def _unknown(attended: Attended) -> list[list[float | None]]:
    """``None`` for every sequence and head."""
    B, H, _, _ = attended.query_BHQD.shape
    return [[None] * H for _ in range(B)]


def _rounded(value: float) -> float | None:
    return round(value, DIGITS) if math.isfinite(value) else None
