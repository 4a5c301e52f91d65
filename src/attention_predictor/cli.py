"""Run long-context language models whose KV cache does not fit on the GPU.

attnpred COMMAND --help explains a command and its options.

examples:
  attnpred generate --prompt-file report.txt --budget 1024
  attnpred record --data texts/ --out runs/histories
  attnpred train --data runs/histories --out runs/mine
  attnpred eval needle --data texts/ --no-chat --out runs/needle
  attnpred bench decode --context 8192 --budget 512
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from attention_predictor import __version__
from attention_predictor.commands import COMMANDS, add_commands
from attention_predictor.errors import AttentionPredictorError
from attention_predictor.parser import OptionError, Parser

BAD_INPUT, INTERRUPTED, NO_READER = 2, 130, 141  # exit codes; commands return others themselves

__all__ = ["COMMANDS", "main", "make_parser"]


def make_parser() -> Parser:
    """All commands and their options."""
    parser = Parser(prog="attnpred", description=__doc__)
    parser.add_argument("--version", action="version", version=f"attnpred {__version__}")
    add_commands(parser, COMMANDS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 2, with one line on stderr, for bad input or unwritable output."""
    name = "attnpred"
    with suppress(AttributeError, ValueError):  # not a real stream
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        try:
            args = make_parser().parse_args(sys.argv[1:] if argv is None else argv)
            name = f"attnpred {args.command}"
            args.check(args)
            return _implementation(args.implementation)(args) or 0
        finally:
            if sys.stdout is not None:  # it may be closed
                sys.stdout.flush()  # report write errors here, not at interpreter exit
    except OptionError as error:
        return _failed(" ".join(error.prog.split()[:2]), str(error), BAD_INPUT)
    except AttentionPredictorError as error:
        return _failed(name, str(error), BAD_INPUT)
    except BrokenPipeError:
        _discard_output()
        return NO_READER
    except OSError as error:
        _discard_output()
        where = f"{error.filename}: " if error.filename else ""
        return _failed(name, f"{where}{error.strerror or error}", BAD_INPUT)
    except KeyboardInterrupt:
        return _failed(name, "interrupted", INTERRUPTED)


def _implementation(module: str) -> Callable[..., int | None]:
    try:
        return importlib.import_module(module).main
    except ModuleNotFoundError as error:  # an optional package
        if error.name is None or error.name.startswith("attention_predictor"):
            raise
        raise AttentionPredictorError(f"needs {error.name}: pip install 'attention-predictor[train]'") from error


def _failed(name: str, message: str, code: int) -> int:
    with suppress(OSError):  # for example a full disk
        print(f"{name}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def _discard_output() -> None:
    """Drop pending standard output if it can't be written, so that it is not tried again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
