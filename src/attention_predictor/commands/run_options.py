"""Options that every benchmark of ``attnpred eval`` has."""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.arguments import (
    add_device_map_argument,
    add_model_arguments,
    add_option,
    add_tp_argument,
    check_model_arguments,
    check_output,
    whole_numbers,
)
from attention_predictor.eval.harness.rules import Rule, check_names, check_variants
from attention_predictor.kinds import whole
from attention_predictor.offload.config import PREFETCHERS
from attention_predictor.settings import add_setting

POLICIES = "full,predictor"
BUDGETS = "512,1024"


def add_run_arguments(parser: argparse.ArgumentParser, *, budgets: str = BUDGETS, out_required: bool = True) -> None:
    """``--model`` and others, ``--policies --rule --budgets --prefetch --limit --out --retry-errors``.

    Args:
        budgets: Default of ``--budgets``.
        out_required: Whether the command needs ``--out``.
    """
    add_model_arguments(parser)
    add_device_map_argument(parser)
    add = parser.add_argument
    what = "policies to run with default settings; full is the stock model"
    what += f" (default: {POLICIES}, or none if --rule is given)"
    add("--policies", metavar="P,P", help=what)
    what = "add a policy with other settings: [NAME:] POLICY[,FIELD=VALUE…]; repeatable"
    add("--rule", action="append", metavar="RULE", help=what)
    add(
        "--budgets",
        default=budgets,
        metavar="N,N",
        help="budgets to run, in tokens per KV head; each is a row of the table (default: %(default)s)",
    )
    what = f"how blocks are fetched, unless a rule sets it: {', '.join(PREFETCHERS)}"
    add_setting(parser, "prefetch", says=what)
    add_option(parser, "--limit", whole(1), None, "run only the first N samples of each task")
    what = "directory for the results; an unfinished run in it continues"
    what += "" if out_required else "; without it the table is only printed"
    add("--out", type=Path, required=out_required, metavar="DIR", help=what)
    add("--retry-errors", action="store_true", help="run samples again that failed before")
    add_tp_argument(parser, "samples")


def rules_of(args: argparse.Namespace) -> list[Rule]:
    """The rules given by ``--policies`` and ``--rule``."""
    given = args.policies if args.policies is not None or args.rule else POLICIES
    named = given.split(",") if given is not None else []
    rules = [Rule(name.strip(), {"policy": name.strip()}) for name in named]
    return rules + [Rule.parse(text) for text in args.rule or ()]


def budgets_of(args: argparse.Namespace) -> list[int]:
    """The budgets given by ``--budgets``, in tokens."""
    return whole_numbers("--budgets", args.budgets)


def check(args: argparse.Namespace) -> None:
    """Raise ``ConfigError`` for wrong values of these options."""
    check_model_arguments(args)
    check_output("--out", args.out, folder=True)
    rules = rules_of(args)
    check_names(rules, "policies must differ in name")
    for rule in rules:
        for budget in budgets_of(args):
            rule.config(budget, prefetch=args.prefetch)
    check_variants(rules)
