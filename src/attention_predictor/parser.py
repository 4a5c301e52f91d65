"""The command line's parser: errors of one line that point to the help, and help for narrow terminals."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from attention_predictor.errors import AttentionPredictorError, ConfigError


class OptionError(ConfigError):
    """An option of the command ``prog`` has a value that is not allowed."""

    def __init__(self, prog: str, message: str) -> None:
        super().__init__(message)
        self.prog = prog


class HelpFormatter(argparse.HelpFormatter):
    """Wraps paragraphs to the terminal's width, except those with indented lines, such as examples."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled = []
        for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
            as_it_is = any(line.startswith(" ") for line in paragraph.splitlines())
            filled.append(paragraph if as_it_is else textwrap.fill(paragraph, width, break_on_hyphens=False))
        return "\n\n".join(filled)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """Reports errors in one line; argparse would print the usage before it.

    Attributes:
        commands: For a group of commands: the attribute that holds the chosen name, and its placeholder in errors.
    """

    commands: tuple[str, str] | None = None

    def __init__(self, **options: Any) -> None:
        defaults: dict[str, Any] = {"formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__(**defaults | options)
        self._given: list[str] = []  # the arguments being parsed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuse unknown arguments here, where the command is known whose help explains them."""
        self._given = list(sys.argv[1:] if args is None else args)
        try:
            found, left = super().parse_known_args(args, namespace)
        except OptionError:  # raised by a subcommand
            raise
        except AttentionPredictorError as error:
            raise OptionError(self.prog, str(error)) from error
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}{self._meant(left)}")
        if self.commands is not None and getattr(found, self.commands[0]) is None:
            self.error(f"the following arguments are required: {self.commands[1]}")
        return found, left

    def _print_message(self, message: str, file: Any = None) -> None:
        """Raise errors of writing the help; argparse would ignore them."""
        try:
            (file or sys.stderr).write(message)
        except OSError:
            if file is sys.stdout:
                raise

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required") and (left := self._unknown()):
            message = (
                f"unrecognized arguments: {' '.join(left)}{self._meant(left)}"  # a missing argument may be among them
            )
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)\n")

    def _unknown(self) -> list[str]:
        """Given options that this command does not have, each with its value."""
        if self.commands is not None:
            return []  # they may be a subcommand's
        known, found, follows = list(self._option_string_actions), list[str](), False
        for word in self._given:
            if word.startswith("--") and " " not in word:
                follows = not any(option.startswith(word.partition("=")[0]) for option in known)
            elif word.startswith("-"):
                follows = False
            if follows:
                found.append(word)
        return found

    def _meant(self, left: Sequence[str]) -> str:
        """A suggestion of an option with a similar name, if any."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        for word in left:
            if word.startswith("-") and (near := get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.7)):
                return f"; did you mean {near[0]}?"
        return ""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = get_close_matches(str(value), list(map(str, action.choices or ())), n=1)
            if near:
                error.message += f"; did you mean {near[0]}?"
            raise
