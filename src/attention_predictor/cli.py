"""``attnpred``: one command, a subcommand for each thing people come for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from attention_predictor import __version__
from attention_predictor.predictor.errors import AttentionPredictorError

# name: (module with add_arguments(parser) and main(args), one line). Modules load only when they are asked for.
COMMANDS = {
    "generate": ("attention_predictor.generate", "generate text with the KV cache in host memory"),
    "record": ("attention_predictor.train.record", "record attention-score histories of a model, to train on"),
    "train": ("attention_predictor.train.fit", "train a predictor on recorded histories"),
    "eval": ("attention_predictor.eval.command", "judge a model under selection policies"),
    "analyze": ("attention_predictor.eval.analysis.command", "show where attention can be foreseen, and why"),
    "score": ("attention_predictor.eval.score", "score predictions of a benchmark again"),
    "report": ("attention_predictor.eval.report", "tables and a page of what eval has found"),
    "prune": ("attention_predictor.eval.prune", "leave out the layers that matter least, and save the model"),
    "bench": ("attention_predictor.eval.bench", "time decoding, or a part of it, against what it replaces"),
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all errors here do; argparse would print the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (2 and one line on stderr for bad input)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="attnpred", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"attnpred {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    named = next((word for word in arguments if not word.startswith("-")), None)
    for name, (module, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == named:
            try:
                implementation = importlib.import_module(module)
            except ModuleNotFoundError as error:  # a package that only some commands need
                print(f"attnpred {name}: needs {error.name}: pip install 'attention-predictor[train]'", file=sys.stderr)
                return 2
            command.description = implementation.__doc__
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.main)
    args = parser.parse_args(arguments)
    try:
        return args.run(args) or 0
    except AttentionPredictorError as error:
        print(f"attnpred {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"attnpred {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
