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

    def load(self, place: Place) -> Recording:
        return self.recordings[place.recording].load(place.document)


def averaged(metrics: Iterable[Metrics]) -> Metrics:
    """The mean over recordings of each figure, among those that have it."""
    every = list(metrics)
    found: Metrics = {}
    for name in METRICS:
        columns = dict.fromkeys(column for one in every for column in one[name])
        found[name] = {column: fmean(one[name][column] for one in every if column in one[name]) for column in columns}
    return found
