"""Disk space and time that a recording will need, estimated before it starts."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from attention_predictor.arithmetic import ceil_div
from attention_predictor.documents import Excerpt
from attention_predictor.errors import DataError
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.predictor.base import PROMPT_ROWS
from attention_predictor.sizes import size_text
from attention_predictor.train.recorder import record

PROBE = 8  # a probe has 1/PROBE of a document's tokens
PROBE_STEPS = 4


def largest_size(model: PreTrainedModel, sequences: int, max_tokens: int, steps: int, block_size: int) -> int:
    """Most bytes that a recording takes on disk: scores and mass in fp16, before compression."""
    config = model.config.get_text_config(decoder=True)
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * 2 * sequences * config.num_hidden_layers * kv_heads * steps * ceil_div(max_tokens, block_size)


def check_space(directory: Path, needed: int) -> str:
    """The recording's largest size, in words; DataError if the disk has less free space."""
    there = next(parent for parent in (directory.absolute(), *directory.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DataError(
            f"--out {directory}: the recording may need {size_text(needed)}, but only {size_text(free)} are free; "
            "take fewer --documents, --steps or --max-tokens"
        )
    return f"at most {size_text(needed)} in {directory} ({size_text(free)} free)"


def seconds_a_document(model: PreTrainedModel, like: Sequence[Excerpt], config: OffloadConfig) -> float:
    """Rough time to record a document, from probes of an eighth and a quarter of its tokens.

    Assumes that a prompt of n tokens costs a·n + b·n², and a step c + d·n.
    """
    tokens = max(len(one.prompt) for one in like)
    sequences = max(len(one.tails) for one in like)
    steps = sum(len(one.tails[0]) for one in like) / len(like)
    small = min(max(tokens // PROBE, PROMPT_ROWS + config.sink + config.recent), tokens // 2)
    _probe(model, small, sequences, 1, config)  # warm-up
    prompts, a_step = [], []
    for size in (small, 2 * small):
        start = _probe(model, size, sequences, 1, config)
        more = _probe(model, size, sequences, 1 + PROBE_STEPS, config)
        a_step.append(max(more - start, 0) / PROBE_STEPS)
        prompts.append(max(start - a_step[-1], 0))
    scale = tokens / small
    square = max(prompts[1] - 2 * prompts[0], 0) / 2
    linear = prompts[1] / 2 - 2 * square
    slope = max(a_step[1] - a_step[0], 0)
    return linear * scale + square * scale**2 + steps * (a_step[1] + slope * max(scale - 2, 0))


def in_words(seconds: float) -> str:
    return f"about {seconds / 3600:.1f} h" if seconds >= 5400 else f"about {max(seconds / 60, 1):.0f} min"


def _probe(model: PreTrainedModel, tokens: int, sequences: int, steps: int, config: OffloadConfig) -> float:
    """Seconds to record random tokens."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    rng = random.Random(0)
    prompt, *tails = ([rng.randrange(vocabulary) for _ in range(count)] for count in (tokens, *([steps] * sequences)))
    started = time.perf_counter()
    for _ in record(model, Excerpt(prompt, tails), config):
        pass
    return time.perf_counter() - started
