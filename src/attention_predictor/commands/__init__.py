"""The commands: their names, options, help texts and the checks that need no library.

A module here declares one command: its help text is the module's docstring; ``add_arguments(parser)`` declares its
options; ``check(args)``, if it exists, refuses wrong values that can be found without loading a library. These modules
import neither torch nor transformers, so help and errors in options appear at once. ``main(args)`` of another module
does the work. That module is imported after all checks have passed.
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
        line: One line of help.
        main: Module whose ``main(args)`` runs the command; empty for a group.
        group: The commands of a group by name.
    """

    line: str
    main: str = ""
    group: Mapping[str, Command] = field(default_factory=dict)


EVAL = {
    "longbench": Command("LongBench and LongBench-E: scores by task", "eval.benchmarks.longbench.command"),
    "needle": Command("needle in a haystack: retrieval by depth and length", "eval.benchmarks.needle"),
    "ruler": Command("RULER: synthetic tasks of any length", "eval.benchmarks.ruler.command"),
    "reasoning": Command("GSM8K, MATH, AIME: accuracy with a chain of thought", "eval.benchmarks.reasoning.command"),
    "perplexity": Command("perplexity of the end of long documents", "eval.benchmarks.perplexity"),
    "synthetic": Command("retrieval tasks that the pocket model was trained on", "eval.benchmarks.synthetic.benchmark"),
    "recovery": Command("answers found, and attention mass recovered", "eval.benchmarks.recovery.command"),
    "recovery-map": Command("attention mass recovered, by layer and head", "eval.benchmarks.recovery.recovery_map"),
    "continuation": Command("long generation: divergence from the stock model", "eval.benchmarks.continuation"),
    "several": Command("several benchmarks in one process; loads the model once", "eval.harness.suite"),
}
BENCH = {
    "decode": Command("decoding steps of a model, against stock caches", "eval.bench.decode"),
    "throughput": Command("tokens per second by context and batch", "eval.bench.throughput"),
    "policies": Command("decoding steps under every selection policy", "eval.bench.policies"),
    "generate": Command("model.generate, against engine.generate", "eval.bench.generate"),
    "perplexity": Command("tokens of eval perplexity under every policy", "eval.bench.perplexity"),
    "prefill": Command("prefill of a long prompt, against stock caches", "eval.bench.prefill"),
    "stream": Command("requests of mixed lengths side by side", "eval.bench.stream"),
    "requests": Command("a series of requests: first token, memory", "eval.bench.requests"),
    "attention": Command("attention kernel: one token over a block pool", "eval.bench.parts.attention"),
    "sketch": Command("sketch kernel: scores of all blocks", "eval.bench.parts.sketch"),
    "predictor": Command("predictor: scores of all blocks for the next token", "eval.bench.parts.predictor"),
    "gather": Command("gather kernel: blocks from host memory to the pool", "eval.bench.parts.gather"),
}
COMMANDS = {
    "generate": Command("generate text with the KV cache in CPU memory", "generate"),
    "record": Command("record a model's attention, to train a predictor", "train.record"),
    "train": Command("train a predictor on recorded attention", "train.fit"),
    "eval": Command("run a benchmark under several selection policies", group=EVAL),
    "analyze": Command("show which heads' attention can be predicted", "eval.analysis.command"),
    "score": Command("score saved predictions of a benchmark again", "eval.benchmarks.longbench.score_command"),
    "report": Command("make tables and an HTML page from runs of eval", "eval.report.command"),
    "prune": Command("remove the least important layers, save the model", "eval.analysis.pruning.command"),
    "bench": Command("time decoding or a kernel, against alternatives", group=BENCH),
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
