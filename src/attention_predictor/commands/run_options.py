"""Options that every benchmark of ``attnpred eval`` has."""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.arguments import add_model_arguments, add_option, check_model_arguments, whole_numbers
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
    add = parser.add_argument
    what = f"policies with their default settings ({POLICIES}, unless there are rules); full is the stock model"
    add("--policies", metavar="P,P", help=what)
    what = "[name:] policy[,field=value…]: one more policy, with other settings; may be given several times"
    add("--rule", action="append", metavar="RULE", help=what)
    add("--budgets", default=budgets, metavar="N,N", help="tokens a step reads, each a row of the table (%(default)s)")
    what = f"of {', '.join(PREFETCHERS)}: how engines prefetch, unless a rule says"
    add_setting(parser, "prefetch", says=what)
    add_option(parser, "--limit", whole(1), None, "the first N samples of each task alone")
    what = "results; an unfinished run in it goes on"
    what += "" if out_required else "; without it only the table is printed"
    add("--out", type=Path, required=out_required, metavar="DIR", help=what)
    add("--retry-errors", action="store_true", help="try samples once more that failed")
    what = "the processes of a launcher divide the model (tensor parallelism); without it they share the samples"
    add("--tp", action="store_true", help=what)


def rules_of(args: argparse.Namespace) -> list[Rule]:
    """What ``--policies`` and ``--rule`` ask for."""
    given = args.policies if args.policies is not None or args.rule else POLICIES
    named = given.split(",") if given is not None else []
    rules = [Rule(name.strip(), {"policy": name.strip()}) for name in named]
    return rules + [Rule.parse(text) for text in args.rule or ()]


def budgets_of(args: argparse.Namespace) -> list[int]:
    """What ``--budgets`` asks for."""
    return whole_numbers("--budgets", args.budgets)


def check(args: argparse.Namespace) -> None:
    """Refuse what can be known to be wrong with these options."""
    check_model_arguments(args)
    rules = rules_of(args)
    check_names(rules, "policies must differ in name")
    for rule in rules:
        for budget in budgets_of(args):
            rule.config(budget, prefetch=args.prefetch)
    check_variants(rules)
