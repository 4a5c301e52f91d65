"""Generate text with the KV cache in CPU memory.

The prompt comes from --prompt, from --prompt-file or from standard input. The text goes to standard output; memory, hit
rate and speed go to standard error.

examples:
  attnpred generate --prompt "Once upon a time" --max-new-tokens 40
  attnpred generate --model meta-llama/Llama-3.1-8B-Instruct --chat \\
      --prompt-file report.txt --budget 1024
  cat book.txt | attnpred generate --policy quest --budget 512 --json
  attnpred generate --prompt-file book.txt --no-offload    # the stock model
"""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_predictor.arguments import (
    add_device_map_argument,
    add_model_arguments,
    add_option,
    check_model_arguments,
)
from attention_predictor.errors import ConfigError
from attention_predictor.kinds import temperature, whole
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.settings import add_setting_arguments, offload_config, option_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_device_map_argument(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt-file", type=Path, metavar="F", help="read the prompt from this UTF-8 file")
    source.add_argument("--prompt", metavar="TEXT", help="use this text as the prompt")
    add = parser.add_argument
    add("--chat", action="store_true", help="wrap the prompt in the tokenizer's chat template")
    add_option(parser, "--max-new-tokens", whole(1), 128, "generate at most N tokens")
    add_option(parser, "--temperature", temperature(), 0.0, "sampling temperature; 0: greedy")
    add("--no-offload", action="store_true", help="run the stock model with its own cache")
    add(
        "--recovery", action="store_true", help="measure attention recovery at every step; same as --measure-recovery 1"
    )
    add("--json", action="store_true", help="print one JSON object: text, tokens, prompt_tokens, stats")
    add_setting_arguments(parser)


def check(args: argparse.Namespace) -> None:
    check_model_arguments(args)
    given, defaults = config_of(args).to_dict(), OffloadConfig().to_dict()
    if args.no_offload and (asked := [name for name, value in given.items() if value != defaults[name]]):
        option = "--recovery" if args.recovery else option_of(asked[0])
        raise ConfigError(f"{option}: --no-offload runs the stock model, which has no such setting: give only one")


def config_of(args: argparse.Namespace) -> OffloadConfig:
    """The settings that the options ask for."""
    return offload_config(args, **({"measure_recovery": args.measure_recovery or 1} if args.recovery else {}))
