"""Arguments that several commands and scripts take."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from attention_predictor.loading import DTYPES
from attention_predictor.predictor.errors import ConfigError

# The folders of the package are links into a checkout; an installed wheel has no models beside it.
_POCKET = Path(__file__).resolve().parents[2] / "models" / "pocket-lm"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``--model --device --dtype --seed``."""
    default = str(_POCKET) if _POCKET.is_dir() else None
    shown = "the pocket model" if default else "required: no pocket model beside this installation"
    parser.add_argument("--model", default=default, metavar="M", help=f"directory or hub name (default: {shown})")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s")
    parser.add_argument("--dtype", default="auto", help=f"one of {', '.join(DTYPES)}; auto is float32 on a CPU")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default %(default)s")


def budget_allocation(option: str, text: str) -> str | list[int]:
    """A name, or the budget of each layer, as ``"256,512"`` or, where commas mean something else, ``"256+512"``."""
    return whole_numbers(option, text.replace("+", ",")) if text[:1].isdigit() else text


def whole_numbers(option: str, text: str) -> list[int]:
    """``"256,512"`` as numbers; ConfigError, naming the option, for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: expected numbers separated by commas") from error
