"""Layer importance: scores, the order of removal, and score files.

ShortGPT (arXiv 2403.03853): block influence BI is 1 − the cosine of a layer's input and output; who changes little goes
first. TAPPA (ICLR 2026, arXiv 2601.21709): who changes little and has queries that hardly turn, by

    BI' = BI_norm + β (1 − q_norm)

with query similarity q; both are min-max normalised over the layers. Its β is 0.2 for Llama-2-7B, 0.3 for Llama-3.1-8B
and 0.1 for Qwen2.5-7B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attention_predictor.errors import ConfigError, DataError
from attention_predictor.reading import read_json

PUBLISHED = {"BI": "bi", "q_similarity": "q_similarity"}  # ``score_type`` of TAPPA's authors, and our name
METRICS = {"bi": ("bi",), "qsim": ("q_similarity",), "tappa": ("bi", "q_similarity")}  # and the scores they need
BETA = 0.3
SCORES_OF = "scores_of"  # among the settings: the model that was scored

# By name, ``bi`` and ``q_similarity``: a number for each layer, None where a layer has none.
Scores = Mapping[str, Sequence[float | None]]


def normalised(values: Sequence[float]) -> list[float]:
    """From 0, the lowest, to 1, the highest; zeros where all are the same."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]


def importance(scores: Scores, metric: str, beta: float = BETA) -> list[float]:
    """Importance of each layer: BI, 1 − q_norm, or BI'; the lowest is removed first.

    Raises:
        DataError: A score that the metric needs is missing.
    """
    known = {name: _complete(scores, name, metric) for name in METRICS[metric]}
    if metric == "bi":
        return known["bi"]
    unlike = [1 - q for q in normalised(known["q_similarity"])]
    if metric == "qsim":
        return unlike
    return [bi + beta * one for bi, one in zip(normalised(known["bi"]), unlike, strict=True)]


def order(importance: Sequence[float]) -> list[int]:
    """Layers by importance, the least first; of equal ones the lower number."""
    return sorted(range(len(importance)), key=lambda layer: (importance[layer], layer))


@dataclass(frozen=True)
class Plan:
    """The layers to remove, and the scores that decided.

    Attributes:
        count: How many are removed.
    """

    scores: Scores
    metric: str
    beta: float
    count: int

    @property
    def importance(self) -> list[float]:
        return importance(self.scores, self.metric, self.beta)

    @property
    def order(self) -> list[int]:
        return order(self.importance)

    @property
    def removed(self) -> list[int]:
        """Layers that are removed, by number."""
        return sorted(self.order[: self.count])

    def to_dict(self) -> dict[str, Any]:
        """Scores, settings and the resulting order, as plain values."""
        raw = {name: list(values) for name, values in self.scores.items()}
        norms = {f"{name}_norm": normalised(_complete(raw, name, self.metric)) for name in METRICS[self.metric]}
        found = {"importance": self.importance, "order": self.order, "removed": self.removed}
        return {"metric": self.metric, "beta": self.beta} | raw | norms | found


def check_depth(count: int | None, depth: int) -> None:
    """Raise ``ConfigError`` unless ``count`` layers can be removed from ``depth`` layers."""
    if count is not None and not 1 <= count < depth:
        raise ConfigError(f"--layers {count}: expected 1 to {depth - 1}, the model has {depth} layers")


def read_scores(paths: Sequence[Path]) -> tuple[dict[str, list[float | None]], str | None]:
    """Scores from JSON files with ``bi``, ``q_similarity`` or both, such as ``attnpred prune`` writes.

    A file may also be one of TAPPA's authors, which has a ``score_type``, its ``scores`` and the ``model``'s name.

    Returns:
        The scores, and the name of the model that they are of, if a file has it.

    Raises:
        DataError: A file that is none, a score that two files have, or files of different models.
    """
    found: dict[str, list[float | None]] = {}
    origin: dict[str, Path] = {}
    models: dict[str, Path] = {}
    for path in paths:
        saved = read_json(path)
        if (model := _model_of(saved)) is not None:
            models.setdefault(model, path)
        for name, values in _scores_of(saved, path).items():
            if name in found:
                raise DataError(f"{path}: {name} is in {origin[name]} too")
            found[name], origin[name] = values, path
    if len(models) > 1:
        raise DataError(
            f"score files of different models: {', '.join(f'{model} in {models[model]}' for model in models)}"
        )
    depths = {f"{name} of {len(values)} layers in {origin[name]}" for name, values in found.items()}
    if len({len(values) for values in found.values()}) > 1:
        raise DataError(f"score files of models of different depth: {', '.join(sorted(depths))}")
    return found, next(iter(models), None)


def _model_of(saved: object) -> str | None:
    """The model that a file's scores are of; ours may have been read from another file."""
    known = saved if isinstance(saved, dict) else {}
    settings = known.get("settings")
    ours = settings if isinstance(settings, dict) else {}
    named = (known.get("model"), ours.get(SCORES_OF), ours.get("model"))
    return next((name for name in named if isinstance(name, str)), None)


def _scores_of(saved: object, path: Path) -> dict[str, list[float | None]]:
    known = saved if isinstance(saved, dict) else {}
    if "scores" in known:
        kind = known.get("score_type")
        if not isinstance(kind, str) or kind not in PUBLISHED:
            raise DataError(f"{path}: score_type {kind!r}: expected {' or '.join(PUBLISHED)}")
        found = {PUBLISHED[kind]: known["scores"]}
    else:
        found = {name: known[name] for name in PUBLISHED.values() if name in known}
    if not found:
        raise DataError(f"{path}: expected an object with bi, q_similarity or both, or with score_type and scores")
    for name, values in found.items():
        if not isinstance(values, list) or not values or not all(map(_is_score, values)):
            raise DataError(f"{path}: {name}: expected a list of numbers, one a layer; found {values!r:.60}")
    return found


def _is_score(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value is None or (number and math.isfinite(value))  # type: ignore[arg-type]


def _complete(scores: Scores, name: str, metric: str) -> list[float]:
    if name not in scores:
        raise DataError(f"--metric {metric} needs {name} of each layer, which no score file has")
    known = [value for value in scores[name] if value is not None]
    if len(known) < len(scores[name]):
        missing = [layer for layer, value in enumerate(scores[name]) if value is None]
        raise DataError(f"--metric {metric} needs {name} of each layer: layers {missing} have none")
    return known
