"""Several recordings to train one predictor on: of different models, which count equally."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from os import PathLike
from statistics import fmean
from typing import Any, NamedTuple

from attention_predictor.errors import DataError
from attention_predictor.train.dataset import META_FILE, HistoryDataset
from attention_predictor.train.shards import Recording
from attention_predictor.train.validate import METRICS, Metrics

ALIKE = ("block_size", "sink", "recent", "rows")  # what all recordings of a mixture must have in common


class Place(NamedTuple):
    """A document of one of the recordings."""

    recording: int
    document: str


class Mixture:
    """Recordings that agree in blocks, sink, recent and kind of rows; models, layers, heads and lengths may differ.

    Raises:
        DataError: There is none, one can't be read, one is given twice, or two disagree.
    """

    def __init__(self, directories: Sequence[str | PathLike[str]], *, block_size: int | None = None) -> None:
        self.recordings = [HistoryDataset(directory, block_size=block_size) for directory in directories]
        if not self.recordings:
            raise DataError("no recording to train on")
        first = self.recordings[0]
        for number, other in enumerate(self.recordings):
            if any(other.directory.resolve() == before.directory.resolve() for before in self.recordings[:number]):
                raise DataError(f"{other.directory}: recording is given twice")
            for name in ALIKE:
                if other.meta[name] != first.meta[name]:
                    raise DataError(
                        f"{other.directory / META_FILE}: {name} is {other.meta[name]!r}, "
                        f"in {first.directory / META_FILE} it is {first.meta[name]!r}; recordings must agree in it"
                    )

    @property
    def meta(self) -> dict[str, Any]:
        """What the recordings have in common, and the names of their models."""
        models = dict.fromkeys(str(one.meta["model"]) for one in self.recordings)
        return {name: self.recordings[0].meta[name] for name in ALIKE} | {"model": ", ".join(models)}

    @property
    def fingerprint(self) -> str:
        """A hash that changes when one of the recordings does, or their order."""
        prints = [one.fingerprint for one in self.recordings]
        return prints[0] if len(prints) == 1 else hashlib.sha256(" ".join(prints).encode()).hexdigest()[:16]

    def split(self, val_fraction: float, seed: int) -> tuple[list[list[Place]], list[list[Place]]]:
        """Training and held-out documents of each recording. A text is held out of all recordings or of none.

        Held out are the groups of documents recorded for validation, and of a recording without such documents
        ``val_fraction`` of its groups: those that a hash of seed and name puts first.

        Raises:
            DataError: A recording has no document left to train on.
        """
        held_out = {group for dataset in self.recordings for group in _groups_to_hold_out(dataset, val_fraction, seed)}
        parts: tuple[list[list[Place]], list[list[Place]]] = [], []
        for number, dataset in enumerate(self.recordings):
            for held, part in zip((False, True), parts, strict=True):
                names = [one for one in dataset.documents if (dataset.group(one) in held_out) == held]
                part.append([Place(number, name) for name in names])
            if not parts[0][-1]:
                raise DataError(f"{dataset.directory}: no document is left to train on; record at least 2 texts")
        return parts

    def load(self, place: Place) -> Recording:
        return self.recordings[place.recording].load(place.document)


def _groups_to_hold_out(dataset: HistoryDataset, val_fraction: float, seed: int) -> list[str]:
    """Groups that are held out on account of one recording."""
    wanted = [dataset.group(one) for one in dataset.documents if dataset.split(one) == "validation"]
    if wanted:
        return wanted
    groups = {dataset.group(document) for document in dataset.documents}
    by_hash = sorted(groups, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest())
    return by_hash[: max(1, round(val_fraction * len(groups)))]


def left_out(metrics: Sequence[Metrics]) -> list[tuple[int, str]]:
    """The numbers of recordings that have no figure at a budget at which others have one, each with that budget."""
    every = [set(one["recovery"]) for one in metrics]
    budgets = sorted(set().union(*every), key=int)
    return [(number, budget) for budget in budgets for number, found in enumerate(every) if budget not in found]


def averaged(metrics: Iterable[Metrics]) -> Metrics:
    """The mean over recordings of each figure that all of them have, so that they count equally."""
    every = list(metrics)
    found: Metrics = {}
    for name in METRICS:
        columns = [column for column in every[0][name] if all(column in one[name] for one in every)]
        found[name] = {column: fmean(one[name][column] for one in every) for column in columns}
    return found
