"""Commands that are tables of subcommands, each a module with `add_arguments` and `main`."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping


def add_subcommands(parser: argparse.ArgumentParser, table: Mapping[str, tuple[str, str]]) -> None:
    """`table` maps names to a module and one line of help."""
    subcommands = parser.add_subparsers(dest="subcommand", required=True, metavar="{" + ",".join(table) + "}")
    for name, (module, line) in table.items():
        implementation = importlib.import_module(module)
        command = subcommands.add_parser(
            name,
            help=line,
            description=implementation.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        implementation.add_arguments(command)
        command.set_defaults(subcommand_main=implementation.main)


def run_subcommand(args: argparse.Namespace) -> int:
    """The one that was chosen."""
    return args.subcommand_main(args)
