"""What the commands are called, which options they have, and what is wrong with these by themselves.

A module here declares one command: its help text is the module's docstring; ``add_arguments(parser)`` declares its
options; ``check(args)``, where there is one, refuses what can be known to be wrong without loading a library. None of
them imports torch or transformers, so that help and a mistyped option take no time. The work is done by ``main(args)``
of another module, which is imported when all that is right.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from attention_predictor.parser import Parser


@dataclass(frozen=True)
class Command:
    """A command, or a group of commands.

    Attributes:
        line: What it does, in a line.
        main: Module whose ``main(args)`` does it; empty for a group.
        group: Its commands by name.
    """

    line: str
    main: str = ""
    group: Mapping[str, Command] = field(default_factory=dict)


EVAL = {
    "longbench": Command("LongBench and LongBench-E: a table of scores", "eval.benchmarks.longbench.command"),
    "needle": Command("needle in a haystack: found or not, by depth and length", "eval.benchmarks.needle"),
    "ruler": Command("RULER's families of tasks, at any length", "eval.benchmarks.ruler.command"),
    "reasoning": Command("GSM8K, MATH, AIME: problems solved step by step", "eval.benchmarks.reasoning.command"),
    "perplexity": Command("how well the rest of long documents is predicted", "eval.benchmarks.perplexity"),
    "synthetic": Command(
        "the pocket model's own tasks: answers found in long documents", "eval.benchmarks.synthetic.benchmark"
    ),
    "recovery": Command("answers found and attention mass recovered", "eval.benchmarks.recovery.command"),
    "recovery-map": Command("attention mass recovered, by layer and head", "eval.benchmarks.recovery.recovery_map"),
    "continuation": Command(
        "long generation: how far it departs from the whole cache's", "eval.benchmarks.continuation"
    ),
    "several": Command("several of these in one process, the model loaded once", "eval.harness.suite"),
}
BENCH = {
    "decode": Command("whole steps of a model, against the stock caches", "eval.bench.decode"),
    "throughput": Command("tokens a second by context and batch", "eval.bench.throughput"),
    "policies": Command("a decoding step under every selection policy", "eval.bench.policies"),
    "generate": Command("model.generate against engine.generate", "eval.bench.generate"),
    "perplexity": Command("a token of eval perplexity under every policy", "eval.bench.perplexity"),
    "prefill": Command("the prefill of a long prompt, against the stock caches", "eval.bench.prefill"),
    "requests": Command("requests one after another: first token, memory", "eval.bench.requests"),
    "attention": Command("one token over the blocks of a pool", "eval.bench.parts.attention"),
    "sketch": Command("scores of all blocks by the key sketch", "eval.bench.parts.sketch"),
    "predictor": Command("scores of all blocks for the next token", "eval.bench.parts.predictor"),
    "gather": Command("blocks from host memory to the pool", "eval.bench.parts.gather"),
}
COMMANDS = {
    "generate": Command("generate text with the KV cache in host memory", "generate"),
    "record": Command("record attention-score histories of a model, to train on", "train.record"),
    "train": Command("train a predictor on recorded histories", "train.fit"),
    "eval": Command("judge a model under selection policies", group=EVAL),
    "analyze": Command("show where attention can be foreseen, and why", "eval.analysis.command"),
    "score": Command("score predictions of a benchmark again", "eval.benchmarks.longbench.score_command"),
    "report": Command("tables and a page of what eval has found", "eval.report.command"),
    "prune": Command("leave out the layers that matter least, and save the model", "eval.analysis.pruning.command"),
    "bench": Command("time decoding, or a part of it, against what it replaces", group=BENCH),
}


def add_commands(parser: Parser, commands: Mapping[str, Command], words: tuple[str, ...] = ()) -> None:
    """Declare commands, and those of groups; ``words`` lead to them."""
    kept, what = ("subcommand", "SUBCOMMAND") if words else ("command", "COMMAND")
    parser.commands = (kept, "{" + ",".join(commands) + "}" if words else what)
    places = parser.add_subparsers(dest=kept, metavar=what, title="commands")
    for name, command in commands.items():
        path = ".".join((__name__, *words, name)).replace("-", "_")
        declared = importlib.import_module(path)
        one = places.add_parser(name, help=command.line, description=declared.__doc__)
        if command.group:
            add_commands(one, command.group, (*words, name))
            continue
        declared.add_arguments(one)
        one.set_defaults(
            check=getattr(declared, "check", _nothing),
            implementation=f"attention_predictor.{command.main}",
        )


def _nothing(args: argparse.Namespace) -> None:
    """All combinations are allowed."""
