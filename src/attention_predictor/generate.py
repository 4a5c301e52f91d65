"""Generate text with the KV cache in host memory.

examples:
  attnpred generate --prompt "Once upon a time" --max-new-tokens 40
  attnpred generate --model meta-llama/Llama-3.1-8B-Instruct --chat --prompt-file report.txt --budget 1024
  cat book.txt | attnpred generate --policy quest --budget 512 --json
  attnpred generate --prompt-file book.txt --no-offload          # the stock model, for comparison
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from attention_predictor.arguments import add_model_arguments, budget_allocation
from attention_predictor.loading import load_model, load_tokenizer
from attention_predictor.offload.attach import attach
from attention_predictor.offload.config import ALLOCATIONS, CALIBRATIONS, PREFETCHERS, OffloadConfig
from attention_predictor.offload.engine import Engine, check_positions
from attention_predictor.offload.policies import policy_names
from attention_predictor.predictor.errors import ConfigError, DataError

_DEFAULTS = OffloadConfig()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt-file", type=Path, metavar="F", help="file with the prompt (UTF-8)")
    source.add_argument("--prompt", metavar="TEXT", help="the prompt itself; standard input where neither is given")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the tokenizer's chat template")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) decodes greedily")
    add_offload_arguments(parser)
    parser.add_argument("--no-offload", action="store_true", help="run the stock model with its whole cache")
    parser.add_argument("--recovery", action="store_true", help="also measure recovery (slow: needs the truth)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: text, tokens, prompt_tokens, stats")


def add_offload_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``OffloadConfig`` that a command line needs."""
    group = parser.add_argument_group("offloading")
    group.add_argument("--policy", default=_DEFAULTS.policy, help=f"one of {', '.join(policy_names())} (%(default)s)")
    group.add_argument(
        "--budget", type=int, default=_DEFAULTS.budget, metavar="N", help="tokens a step reads (%(default)s)"
    )
    what = f"how layers share it: one of {', '.join(ALLOCATIONS)}, or each layer's, such as 768,1280 (%(default)s)"
    group.add_argument("--budget-allocation", default=_DEFAULTS.budget_allocation, metavar="A", help=what)
    group.add_argument(
        "--block-size", type=int, default=_DEFAULTS.block_size, metavar="N", help="tokens in a block (%(default)s)"
    )
    group.add_argument(
        "--sink", type=int, default=_DEFAULTS.sink, metavar="N", help="first tokens, always read (%(default)s)"
    )
    group.add_argument(
        "--recent", type=int, default=_DEFAULTS.recent, metavar="N", help="last tokens, always read (%(default)s)"
    )
    group.add_argument("--predictor", default=_DEFAULTS.predictor, metavar="P", help="default, a directory, or a rule")
    group.add_argument(
        "--calibration", default=_DEFAULTS.calibration, help=f"one of {', '.join(CALIBRATIONS)} (%(default)s)"
    )
    group.add_argument(
        "--late-fetch", type=float, default=_DEFAULTS.late_fetch, metavar="SHARE", help="default %(default)s"
    )
    group.add_argument(
        "--reserve",
        type=float,
        default=_DEFAULTS.reserve,
        metavar="SHARE",
        help="blocks kept beyond the budget (%(default)s)",
    )
    group.add_argument("--prefetch", default=_DEFAULTS.prefetch, help=f"one of {', '.join(PREFETCHERS)} (%(default)s)")
    group.add_argument("--compile", action="store_true", help="with --prefetch graph: compile the model's layers first")


def offload_config(args: argparse.Namespace, **changes: Any) -> OffloadConfig:
    """The settings that ``add_offload_arguments`` read."""
    return OffloadConfig(
        policy=args.policy,
        budget=args.budget,
        budget_allocation=budget_allocation("--budget-allocation", args.budget_allocation),
        block_size=args.block_size,
        sink=args.sink,
        recent=args.recent,
        predictor=args.predictor,
        calibration=args.calibration,
        late_fetch=args.late_fetch,
        reserve=args.reserve,
        prefetch=args.prefetch,
        compile=args.compile,
        **changes,
    )


def main(args: argparse.Namespace) -> int:
    config = offload_config(args, measure_recovery=int(args.recovery))
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {args.max_new_tokens}: expected at least 1")
    if args.temperature < 0:
        raise ConfigError(f"--temperature {args.temperature}: expected 0 or more")
    prompt = _read_prompt(args)
    tokenizer = load_tokenizer(args.model)
    ids = _encode(tokenizer, prompt, args.chat)
    model = load_model(args.model, args.device, args.dtype)
    torch.manual_seed(args.seed)
    if args.no_offload:
        check_positions(model.config.get_text_config(decoder=True), len(ids) + args.max_new_tokens)
        result = _generate(model, tokenizer, ids, args, None)
    else:
        with attach(model, config) as engine:
            engine.check_fits(batch=1, tokens=len(ids) + args.max_new_tokens)
            result = _generate(model, tokenizer, ids, args, engine)
    if args.json:
        print(json.dumps(result))
    return 0


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        source, text = "--prompt", args.prompt
    elif args.prompt_file is not None:
        source = str(args.prompt_file)
        try:
            text = args.prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise DataError(f"cannot read prompt file {source}: {reason}") from error
    else:
        source, text = "standard input", sys.stdin.read()
    if not text.strip():
        raise DataError(f"the prompt from {source} is empty")
    return text


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(prompt, verbose=False)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("--chat: this model's tokenizer has no chat template")
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(str(text), add_special_tokens=False, verbose=False)["input_ids"])


class _Progress(BaseStreamer):
    """A bar over the new tokens; also notes when the first of them came, which is when the prefill was over."""

    def __init__(self, total: int, prompt_tokens: int) -> None:
        self.bar = tqdm(total=total, unit="tok", desc=f"prefill of {prompt_tokens} tokens", disable=None)
        self.started = time.perf_counter()
        self.first: float | None = None
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.is_prompt:  # generate() shows the streamer the prompt first
            self.is_prompt = False
            return
        if self.first is None:
            self.first = time.perf_counter()
            self.bar.set_description("decoding")
        self.bar.update(value.numel())

    def end(self) -> None:
        self.ended = time.perf_counter()
        self.bar.close()


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    args: argparse.Namespace,
    engine: Engine | None,
) -> dict[str, Any]:
    input_ids = torch.tensor([ids], device=model.device)
    progress = _Progress(args.max_new_tokens, len(ids))
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    try:
        output = model.generate(  # type: ignore[operator]  # mixed in by a class that mypy does not see
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=args.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=progress,
            **sampling,
        )
    finally:
        progress.bar.close()
    tokens = output[0, len(ids) :].tolist()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    decode_s = progress.ended - (progress.first or progress.started)
    stats: dict[str, Any] = {
        "prefill_s": (progress.first or progress.ended) - progress.started,
        "tokens_per_s": (len(tokens) - 1) / decode_s if len(tokens) > 1 and decode_s > 0 else None,
    }
    if engine is not None:
        stats |= engine.stats.to_dict()
    if not args.json:
        print(text)
        rate = f"{stats['tokens_per_s']:.1f}" if stats["tokens_per_s"] else "–"
        print(f"\n{'prompt, new tokens':<26}{len(ids)}, {len(tokens)}", file=sys.stderr)
        print(f"{'prefill':<26}{stats['prefill_s']:.2f} s", file=sys.stderr)
        print(f"{'decoding':<26}{rate} tokens/s", file=sys.stderr)
        if engine is not None:
            print(engine.stats, file=sys.stderr)
    return {"text": text, "tokens": tokens, "prompt_tokens": len(ids), "stats": stats}
