"""Saves figures."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from attention_predictor.writing import write_atomically, writing


def save_figure(figure: Any, path: Path, dpi: int = 160) -> None:
    """Save a matplotlib figure atomically, in the format of the file's suffix."""
    packed = io.BytesIO()
    figure.savefig(packed, format=path.suffix.removeprefix("."), dpi=dpi)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, packed.getvalue())
