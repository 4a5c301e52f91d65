"""Write docs/configuration.md from the declaration of the settings (offload/config.py); with --check, compare alone.

Type, default and allowed values are those of the fields, meanings those of OffloadConfig's docstring, options those of
the commands' own parsers.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from attention_predictor.cli import make_parser
from attention_predictor.offload.config import GROUPS, OffloadConfig
from attention_predictor.settings import FIELDS, option_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
HEAD = """\
# Configuration

<!-- Made by scripts/document_settings.py from offload/config.py; a test holds them equal. -->

`OffloadConfig` has every setting of an attached engine. A setting can be given in three ways, which take the same
values:

| | example | several layers | no value |
|---|---|---|---|
| Python | `OffloadConfig(budget=512, skip_layers=(0, 1))` | `(0, 1)` | `None` |
| option of a command | `attnpred generate --budget 512 --skip-layers 0,1` | `0,1` | `none` |
| field of a rule | `--rule "mine: predictor,budget=512,skip_layers=0+1"` | `0+1` | `none` |

A rule is `[name:] policy[,field=value…]`. As text, `True` is also `yes` or `1`, or the option alone; `False` is also
`no` or `0`. Bytes may have a unit, such as `64GiB`. Token counts are per KV head.

A value that is not allowed is refused before anything is loaded, with one line that names the setting, the value and
what is allowed, and exit code 2:

    attnpred generate: --late-fetch 2: expected a share from 0 to 1, or auto
"""

COMMANDS = """\
`attnpred generate` has all of these options. Other commands have some; where the default is another one, it stands in
parentheses. `attnpred eval` takes all other settings by `--policies`, `--budgets` and `--rule`.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is another one")
    args = parser.parse_args()
    page = make_page()
    if args.check:
        same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page
        if not same:
            print(f"{PAGE}: out of date; run scripts/document_settings.py", file=sys.stderr)
        return int(not same)
    PAGE.write_text(page, encoding="utf-8")
    return 0


def make_page() -> str:
    """All of docs/configuration.md."""
    meanings = read_meanings(inspect.getdoc(OffloadConfig) or "")
    parts = [HEAD]
    for group, what in GROUPS.items():
        rows = ["| field | type | default | allowed | option | meaning |", "|---|---|---|---|---|---|"]
        rows += [row(name, meanings[name]) for name, one in FIELDS.items() if one.metadata["group"] == group]
        parts.append(f"## {group.capitalize()}: {what}\n\n" + "\n".join(rows) + "\n")
    commands = defaultdict(list)
    for command, options in other_commands():
        commands[options].append(code(command))
    lines = [f"- {', '.join(names)}: {options}" for options, names in commands.items()]
    parts.append(f"## Options of other commands\n\n{COMMANDS}\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def row(name: str, meaning: str) -> str:
    """A field's row of the table."""
    one = FIELDS[name]
    kind, also = one.metadata["kind"], one.metadata["also"]
    option = f"{option_of(name)} {kind.metavar}" if kind.alone is None else option_of(name)
    allowed = kind.allowed + (f"; {also}" if also else "")
    cells = [code(name), code(str(one.type)), code(repr(one.default)), allowed, code(option), meaning]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def code(text: str) -> str:
    return f"`{text}`"


def read_meanings(docstring: str) -> dict[str, str]:
    """What the docstring says of each field, on one line."""
    found: dict[str, list[str]] = {}
    name = None
    for line in docstring.splitlines():
        if entry := re.match(r" {4}(\w+): (.+)", line):
            name = entry[1]
            found[name] = [entry[2]]
        elif name is not None and line.startswith(" " * 8):
            found[name].append(line.strip())
        else:
            name = None
    return {name: " ".join(lines).replace("``", "`") for name, lines in found.items()}


def other_commands() -> Iterator[tuple[str, str]]:
    """Commands other than generate that have options of settings, and which these are."""
    for command, parser in walk(make_parser()):
        options = [
            code(option_of(action.dest))
            + ("" if action.default == FIELDS[action.dest].default else f" ({action.default})")
            for action in parser._actions
            # Another option of the same name, such as --budget of a kernel's timing, has a kind of its own.
            if action.dest in FIELDS and getattr(action, "kind", None) is FIELDS[action.dest].metadata["kind"]
        ]
        if options and command != "generate":
            yield command, ", ".join(options)


def walk(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """All parsers, with the words that lead to them."""
    yield " ".join(words), parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, one in action.choices.items():
                yield from walk(one, (*words, name))


if __name__ == "__main__":
    sys.exit(main())
