"""What people read first: help, and one line for what is mistyped, before any library loads."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator

import pytest

from attention_predictor.cli import main, make_parser
from attention_predictor.parser import Parser

HEAVY = ("torch", "transformers", "datasets", "matplotlib", "accelerate", "numpy")
# Runs a command in a process of its own and tells on its last line which of the libraries were imported.
PROBE = f"""
import sys
from attention_predictor.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code or 0
print(code, *[name for name in {HEAVY!r} if name in sys.modules])
"""


def walk(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Parser]]:
    """All parsers, with the words that lead to them."""
    assert isinstance(parser, Parser)
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, one in action.choices.items():
                yield from walk(one, (*words, name))


PARSERS = dict(walk(make_parser()))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    try:
        code = main([str(one) for one in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize("words", PARSERS, ids=" ".join)
def test_help_reads_well(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    parser = PARSERS[words]
    text = parser.format_help()
    assert "`" not in text
    assert max(map(len, text.splitlines())) <= 80
    _, examples = text.split("\nexamples:\n")
    assert parser.description.strip()
    lines = examples.split("\n\n")[0].splitlines()
    assert any(line.startswith(" ".join(("  attnpred", *words))) for line in lines), lines
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            assert action.help, action.option_strings
            assert action.help is not argparse.SUPPRESS
        else:
            assert all(one.help for one in action._choices_actions)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        *[(" ".join((*words, "--help")), 0) for words in PARSERS],
        ("--version", 0),
        ("", 2),
        ("sing", 2),
        ("eval", 2),
        ("eval needle --foo", 2),
        ("generate --prompt x --policy best", 2),
        ("generate --prompt x --budget 3", 2),
        ("generate --prompt x --budget many", 2),
        ("generate --prompt x --model file.gguf", 2),
        ("record --data . --out x --steps 3", 2),
        ("train --data x --out y --lr 9", 2),
        ("eval recovery --data x --rule predictor,compile=maybe", 2),
        ("eval needle --data x --out y --budgets few", 2),
        ("eval longbench --data x --out y --tasks trek", 2),
        ("eval ruler --out y --tasks riddles", 2),
        ("prune --metric size", 2),
        ("analyze --data x --out y --window 1", 2),
        ("score trek x", 2),
        ("report x --seed -1", 2),
        ("bench decode --ways fast", 2),
        ("bench prefill --chunk 0", 2),
        ("bench gather --blocks 0", 2),
    ],
)
def test_no_library_is_imported(arguments: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments.split()], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == str(code), done.stdout[-300:] + done.stderr
    assert len(done.stderr.splitlines()) == (code == 2)


@pytest.mark.slow
def test_the_package_and_its_names_import_no_library() -> None:
    program = f"""
import sys
import attention_predictor
from attention_predictor import ConfigError, OffloadConfig
from attention_predictor.offload.policies import policy_names
assert "predictor" in policy_names()
assert {{"attach", "Engine", "__version__"}} <= set(dir(attention_predictor))
try:
    OffloadConfig(policy="best")
except ConfigError as error:
    assert "full, streaming" in str(error)
assert not [name for name in {HEAVY!r} if name in sys.modules]
try:
    attention_predictor.attack
except AttributeError as error:
    assert "attention_predictor" in str(error)
from attention_predictor import *
assert attach and AttentionPredictor.from_pretrained("ema").arch == "ema"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["predictor.base", "predictor.history", "csrc.ops", "offload.hf.layer", "offload.hf.graph"]
)
def test_modules_can_be_imported_first(module: str) -> None:
    program = (
        f"import attention_predictor.{module}\nfrom attention_predictor.predictor.base import AttentionPredictor\n"
    )
    program += "assert AttentionPredictor.from_pretrained('default').arch == 'time-filters'"
    subprocess.run([sys.executable, "-c", program], check=True)


class TestMistyped:
    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (
                ("eval", "needle", "--data", "x", "--out", "y", "--foo"),
                "attnpred eval needle: unrecognized arguments: --foo (see attnpred eval needle --help)",
            ),
            (
                ("eval", "needle", "--data", "x", "--out", "y", "--budgest", "5"),
                "attnpred eval needle: unrecognized arguments: --budgest 5; did you mean --budgets? "
                "(see attnpred eval needle --help)",
            ),
            (
                ("bench", "decode", "--contxt=5"),
                "attnpred bench decode: unrecognized arguments: --contxt=5; did you mean --context? "
                "(see attnpred bench decode --help)",
            ),
            (
                ("generate", "--promt", "x"),
                "attnpred generate: unrecognized arguments: --promt x; did you mean --prompt?",
            ),
            (
                ("eval", "needle", "--data", "x", "--ot", "y"),
                "attnpred eval needle: unrecognized arguments: --ot y; did you mean --out?",
            ),
            (
                ("train", "--dta=x", "--out", "y", "--resume"),
                "attnpred train: unrecognized arguments: --dta=x; did you mean --data?",
            ),
            (("trian",), "attnpred: argument COMMAND: invalid choice: 'trian'"),
            (("eval", "nedle"), "attnpred eval: argument SUBCOMMAND: invalid choice: 'nedle'"),
            (("eval", "needle"), "attnpred eval needle: the following arguments are required: --out, --data"),
        ],
    )
    def test_one_line_with_the_command_s_own_help(self, arguments, line, capsys):
        assert refused(capsys, *arguments).startswith(line)

    @pytest.mark.parametrize(("name", "meant"), [("trian", "train"), ("reprot", "report")])
    def test_a_command_of_a_similar_name(self, name, meant, capsys):
        assert f"; did you mean {meant}? (see attnpred --help)" in refused(capsys, name)


class TestOneOptionIsNamed:
    """Its value and what is allowed, and no other option."""

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (("record", "--data", ".", "--out", "x", "--steps", "8"), "--steps 8: expected --steps above 64"),
            (("record", "--data", ".", "--out", "x", "--per-file", "0"), "--per-file 0: expected at least 1"),
            (
                ("record", "--data", ".", "--out", "x", "--validation", "1"),
                "--validation 1: expected a share from 0 to below 1",
            ),
            (("record", "--data", ".", "--out", "x", "--documents", "0"), "--documents 0: expected at least 1"),
            (("bench", "decode", "--steps", "0"), "--steps 0: expected at least 1"),
            (("bench", "decode", "--batch", "-1"), "--batch -1: expected at least 1"),
            (("eval", "recovery", "--data", "x", "--questions", "0"), "--questions 0: expected at least 1"),
            (("eval", "recovery", "--data", "x", "--per-document", "0"), "--per-document 0: expected at least 1"),
            (("eval", "recovery", "--data", "x", "--recovery", "-1"), "--recovery -1: expected at least 0"),
            (("eval", "needle", "--data", "x", "--out", "y", "--limit", "0"), "--limit 0: expected at least 1"),
        ],
    )
    def test_line(self, arguments, said, capsys):
        line = refused(capsys, *arguments)
        assert line == f"attnpred {arguments[0]}: {said}"
