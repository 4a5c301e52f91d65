"""``attnpred generate``: continue a prompt, and print statistics."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from attention_predictor.commands.generate import config_of
from attention_predictor.errors import ConfigError, DataError
from attention_predictor.launcher import Launcher
from attention_predictor.loading import load_model, load_tokenizer
from attention_predictor.offload.engine import Engine
from attention_predictor.offload.hf.attach import attach
from attention_predictor.offload.hf.forwards import cached_length, check_positions
from attention_predictor.offload.hf.placement import input_device
from attention_predictor.progress import Progress
from attention_predictor.reading import check_unicode, read_standard_input, read_text


def main(args: argparse.Namespace) -> int:
    """Processes of a launcher divide the model; they get the same tokens, and the first one prints them."""
    launcher = Launcher()
    with launcher.as_one():
        return _run(args, launcher)


def _run(args: argparse.Namespace, launcher: Launcher) -> int:
    if launcher.count > 1 and args.prompt is None and args.prompt_file is None:
        raise ConfigError(
            f"{launcher.count} processes can't share standard input; allowed are --prompt and --prompt-file"
        )
    prompt = _read_prompt(args)
    tokenizer = load_tokenizer(args.model)
    ids = _encode(tokenizer, prompt, args.chat)
    model = load_model(args.model, args.device, args.dtype, launcher.count, args.device_map)
    torch.manual_seed(args.seed)
    tokens = cached_length(len(ids), args.max_new_tokens)
    if args.no_offload:
        check_positions(model.config.get_text_config(decoder=True), tokens)
        result = _generate(model, tokenizer, ids, args, None, launcher)
    else:
        with attach(model, config_of(args)) as engine:
            engine.check_fits(batch=1, tokens=tokens)
            result = _generate(model, tokenizer, ids, args, engine, launcher)
    if args.json:
        print(json.dumps(result))
    if launcher.count > 1:
        dist.destroy_process_group()
    return 0


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        source, text = "--prompt", check_unicode(args.prompt, "--prompt")
    elif args.prompt_file is not None:
        source, text = str(args.prompt_file), read_text(args.prompt_file, "prompt file")
    else:
        source, text = "standard input", check_unicode(read_standard_input(), "standard input")
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


class _Watcher(BaseStreamer):
    """Shows progress, and records the time of the first new token, when the prefill was done."""

    def __init__(self, total: int, prompt_tokens: int, quiet: bool) -> None:
        self.progress = Progress(f"prefill of {prompt_tokens} tokens", total, "tokens", quiet=quiet)
        self.started = time.perf_counter()
        self.first: float | None = None
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.is_prompt:  # generate() passes the prompt first
            self.is_prompt = False
            return
        self.progress.update(value.numel())
        if self.first is None:
            self.first = time.perf_counter()
            self.progress.describe("decoding", anew=True)

    def end(self) -> None:
        self.ended = time.perf_counter()
        self.progress.close()


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    args: argparse.Namespace,
    engine: Engine | None,
    launcher: Launcher,
) -> dict[str, Any]:
    input_ids = torch.tensor([ids], device=input_device(model))
    watcher = _Watcher(args.max_new_tokens, len(ids), quiet=not launcher.is_main)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    try:
        output = model.generate(  # type: ignore[operator]  # mixed in by a class that mypy does not see
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=args.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=watcher,
            **sampling,
        )
    finally:
        watcher.progress.close(finished=False)  # if it has not ended
    tokens = output[0, len(ids) :].tolist()
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    decode_s = watcher.ended - (watcher.first or watcher.started)
    stats: dict[str, Any] = {
        "prefill_s": (watcher.first or watcher.ended) - watcher.started,
        "tokens_per_s": (len(tokens) - 1) / decode_s if len(tokens) > 1 and decode_s > 0 else None,
    }
    if engine is not None:
        stats |= engine.stats.to_dict()
    if not args.json and launcher.is_main:
        print(text)
        rate = f"{stats['tokens_per_s']:.1f}" if stats["tokens_per_s"] else "–"
        print(f"\n{'prompt, new tokens':<26}{len(ids)}, {len(tokens)}", file=sys.stderr)
        print(f"{'prefill':<26}{stats['prefill_s']:.2f} s", file=sys.stderr)
        print(f"{'decoding':<26}{rate} tokens/s", file=sys.stderr)
        if engine is not None:
            print(engine.stats, file=sys.stderr)
    return {"text": text, "tokens": tokens, "prompt_tokens": len(ids), "stats": stats}
