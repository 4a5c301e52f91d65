"""``--policies``: the policies that a timing compares, in order."""

from __future__ import annotations

import argparse

from attention_predictor.offload.policies import policy_class
from attention_predictor.offload.policy_names import BUILT_IN

BASE = "predictor"


def add_policies(parser: argparse.ArgumentParser) -> None:
    """``--policies``, all of them by default."""
    names = [BASE, *(name for name in BUILT_IN if name != BASE)]
    parser.add_argument(
        "--policies",
        default=",".join(names),
        metavar="P,P",
        help="policies to time; ratios are relative to the first one (default: all, predictor first)",
    )


def policies_of(text: str) -> list[str]:
    """Names in their order, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def check_policies(text: str) -> None:
    """Raise ``ConfigError`` for a name that is not a policy."""
    for name in policies_of(text):
        policy_class(name)
