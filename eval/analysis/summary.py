"""Summary over all documents: figures of each head, and query similarity against recovery."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

from attention_predictor.errors import DataError
from attention_predictor.eval.analysis.benchmark import PREDICTORS, VARIANT
from attention_predictor.eval.analysis.correlation import Correlation, rank_correlation
from attention_predictor.eval.analysis.examples import Example
from attention_predictor.eval.analysis.patterns import CLASSES, most_common
from attention_predictor.eval.harness.run_folder import RunFolder

SIMILARITIES = ("qsim_prompt_plain", "qsim_prompt", "qsim_steps_plain", "qsim_steps")
RECOVERIES = tuple(f"{name}_{what}" for name in PREDICTORS for what in ("relative", "far"))
COMPARED = (*RECOVERIES, "far_mass")  # with similarity; where little lies far, there is little to recover
BY_HEAD = "_head"  # suffix of a recovery computed for a single query head, not for all heads of its KV head
MEANS = (
    *SIMILARITIES,
    *(f"{name}_{what}{of}" for of in ("", BY_HEAD) for name in PREDICTORS for what in ("share", "relative", "far")),
    *("far_mass", "vertical", "diagonal", "chance", "echo", "back", "focus"),
)


class FILES:
    """Files written into the run's directory."""

    heads, correlation, parquet, page = "heads.json", "correlation.json", "heads.parquet", "gallery.html"


@dataclass(frozen=True)
class Head:
    """A query head, averaged over its maps.

    Attributes:
        means: Each of ``MEANS``, averaged over the maps that have it; ``None`` if none has.
        maps: How many maps show which pattern.
        pattern: The one that most of them show.
        period, period_unit: Median over its seasonal maps, where it is seasonal.
        channels: Mean part of each pair of RoPE channels in logits, channels that don't turn last.
    """

    layer: int
    head: int
    kv_head: int
    means: Mapping[str, float | None]
    maps: Mapping[str, int]
    pattern: str
    period: float | None
    period_unit: str | None
    channels: Sequence[float] | None

    def to_row(self) -> dict[str, Any]:
        """Flat, for a table."""
        row: dict[str, Any] = {"layer": self.layer, "head": self.head, "kv_head": self.kv_head} | dict(self.means)
        row |= {"pattern": self.pattern, "period": self.period, "period_unit": self.period_unit}
        row |= {f"maps_{name.replace('-', '_')}": self.maps.get(name, 0) for name in CLASSES}
        return row | {"channels": None if self.channels is None else list(self.channels)}


@dataclass
class Summary:
    """All of an analysis.

    Attributes:
        settings: Settings of the run.
        documents: Number of documents by data name.
        wavelengths: Wavelengths of the channel pairs in tokens, by layer.
        examples: Examples by pattern, each with its document's name.
        correlations: By level (``head`` or ``kv_head``), similarity, and the figure compared with.
        failures: Error messages of failed documents.
    """

    settings: Mapping[str, Any]
    documents: Mapping[str, int]
    heads: list[Head]
    wavelengths: Mapping[int, list[float]]
    examples: Mapping[str, list[tuple[str, Example]]]
    correlations: dict[tuple[str, str, str], Correlation] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def kv_heads(self) -> list[tuple[int, int, list[Head]]]:
        """Layer, number and query heads of every KV head."""
        found: dict[tuple[int, int], list[Head]] = defaultdict(list)
        for head in self.heads:
            found[head.layer, head.kv_head].append(head)
        return [(layer, number, heads) for (layer, number), heads in sorted(found.items())]

    def pairs(self, level: str, similarity: str, other: str) -> list[tuple[float | None, float | None]]:
        """Both figures of every ``head``, or of every ``kv_head``: the mean of its query heads."""
        if level == "head":
            name = other + BY_HEAD if other in RECOVERIES else other
            return [(head.means[similarity], head.means[name]) for head in self.heads]
        groups = [heads for _, _, heads in self.kv_heads]
        return [
            (_mean(head.means[similarity] for head in heads), _mean(head.means[other] for head in heads))
            for heads in groups
        ]

    def files(self) -> Iterator[tuple[str, str]]:
        """Name and text of the JSON files."""
        heads: dict[str, Any] = {"settings": self.settings, "documents": self.documents, "failures": self.failures}
        heads["wavelengths"] = self.wavelengths
        yield FILES.heads, json.dumps(heads | {"heads": [head.to_row() for head in self.heads]}, indent=1)
        pairs = [
            {"over": level, "similarity": one, "with": other} | asdict(found)
            for (level, one, other), found in self.correlations.items()
        ]
        yield FILES.correlation, json.dumps(pairs, indent=1)

    def write_parquet(self, path: Path) -> None:
        """A row a layer and head; needs pyarrow."""
        import pyarrow
        import pyarrow.parquet

        draft = path.with_name(f".{path.name}")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([head.to_row() for head in self.heads]), draft)
        draft.replace(path)


def summarise(folder: RunFolder) -> Summary:
    """Read all results of a run; ``DataError`` where they are not an analysis's."""
    maps: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    wavelengths: dict[int, list[float]] = {}
    documents: dict[str, int] = {}
    failures: list[str] = []
    drawn: dict[str, list[tuple[str, Example]]] = {name: [] for name in CLASSES}
    try:
        for task in folder.tasks:
            documents[task] = 0
            for record in folder.records(VARIANT, task):
                if "error" in record:
                    failures.append(f"{task} {record['id']}: {record['error']}")
                    continue
                documents[task] += 1
                for row in record["rows"]:
                    maps[row["layer"], row["head"]].append(row)
                for layer, values in record["wavelengths"].items():
                    wavelengths.setdefault(int(layer), values)
                for values in record["examples"]:
                    example = Example.from_dict(values)
                    drawn[example.head["pattern"]].append((f"{task}: {record['id']}", example))
        heads = [_head(layer, number, maps[layer, number]) for layer, number in sorted(maps)]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder.path}: not results of an analysis: {error!r}") from error
    examples = {name: _clearest(found) for name, found in drawn.items()}
    settings = folder.description["settings"]
    summary = Summary(settings, documents, heads, wavelengths, examples, failures=failures)
    for level, one, other in product(("head", "kv_head"), SIMILARITIES, COMPARED):
        found = rank_correlation(summary.pairs(level, one, other), settings["seed"])
        summary.correlations[level, one, other] = found
    return summary


def _head(layer: int, number: int, rows: Sequence[Mapping[str, Any]]) -> Head:
    patterns = [row["pattern"] for row in rows]
    pattern, unit = most_common(patterns), None
    periods: list[float] = []
    if pattern == "seasonal":
        units = Counter(row["period_unit"] for row in rows if row["period_unit"])
        unit = max(sorted(units), key=lambda name: units[name])
        periods = [row["period"] for row in rows if row["period_unit"] == unit]
    channels = [row["channels"] for row in rows if row["channels"] is not None]
    return Head(
        layer=layer,
        head=number,
        kv_head=rows[0]["kv_head"],
        means={name: _mean(row[name] for row in rows) for name in MEANS},
        maps=Counter(patterns),
        pattern=pattern,
        period=median(periods) if periods else None,
        period_unit=unit,
        channels=[fmean(of_pair) for of_pair in zip(*channels, strict=True)] if channels else None,
    )


def _clearest(found: Sequence[tuple[str, Example]]) -> list[tuple[str, Example]]:
    """The clearest map classified beyond sink and recent, and the clearest one classified as a whole."""
    kept: dict[str, tuple[str, Example]] = {}
    for name, example in sorted(found, key=lambda one: -one[1].head["clarity"]):
        kept.setdefault(example.head["part"], (name, example))
    return [kept[part] for part in ("far", "all") if part in kept]


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
