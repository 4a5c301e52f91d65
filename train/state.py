"""The state of an unfinished run, from which it continues to the same loss curve."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from attention_predictor.predictor.errors import CheckpointError, ConfigError, one_line

STATE_FILE = "training-state.pt"


def write_state(directory: Path, state: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = directory / f".{STATE_FILE}.partial"
    torch.save(state, partial)
    os.replace(partial, directory / STATE_FILE)


def read_state(directory: Path, options: dict[str, Any], *, resume: bool) -> dict[str, Any] | None:
    """What the run in `directory` left, `None` if there is nothing to continue.

    ConfigError if there is and `resume` is not asked for, or if its `options` were others; CheckpointError for a file
    that can't be read.
    """
    path = directory / STATE_FILE
    if not path.exists():
        return None
    if not resume:
        raise ConfigError(f"{path}: an unfinished run is here; continue it with --resume, or delete the file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["options"]
    except Exception as error:  # a damaged pickle trips over anything
        raise CheckpointError(f"{path}: not a training state ({one_line(error)})") from error
    differing = [
        f"{name} was {before.get(name)!r}, is {value!r}" for name, value in options.items() if before.get(name) != value
    ]
    if differing:
        raise ConfigError(f"{path}: the unfinished run had other options ({'; '.join(differing)})")
    return state


def forget_state(directory: Path) -> None:
    (directory / STATE_FILE).unlink(missing_ok=True)
