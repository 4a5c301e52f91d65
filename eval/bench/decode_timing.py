"""Times decoding with one cache setup: fill, warm up, time each step, profile."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attention_predictor.errors import HostMemoryError, one_line
from attention_predictor.eval.bench.breakdown import breakdown
from attention_predictor.eval.bench.cache_sessions import CacheSession, CacheSetup, open_cache, why_too_large
from attention_predictor.eval.bench.device import release, wait
from attention_predictor.eval.bench.static_step import StockModelError
from attention_predictor.eval.bench.synthetic_cache import PAST, SyntheticCache
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.hf.versions import with_cache
from attention_predictor.offload.ranks import Ranks
from attention_predictor.settings import offload_config

WARM_UP = 5  # steps: compilers compile in the first ones, graphs are captured
PROFILED = 3  # steps after the timed ones
LEAST = 5  # timed steps, however long they take


@dataclass(frozen=True, slots=True)
class Workload:
    """What is decoded, the same for all setups.

    Attributes:
        ids_1T: The prompt, then the tokens of the steps; sequences of a batch are all the same.
        steps: Timed ones; ``WARM_UP`` come before and ``PROFILED`` after.
        seconds: Time limit of the timed steps; at least ``LEAST`` are taken.
        synthetic: Fills the caches with synthetic keys; ``None`` for a real prefill.
        limit_bytes: Limit of device memory; ``None`` for all of it.
        config: Settings of our caches.
    """

    ids_1T: Tensor
    steps: int
    batch: int
    config: OffloadConfig
    seconds: float
    synthetic: SyntheticCache | None
    limit_bytes: int | None = None

    @classmethod
    def of(
        cls, model: PreTrainedModel, context: int, args: argparse.Namespace, limit_bytes: int | None = None
    ) -> Workload:
        """From ``--steps --batch --seconds --seed --synthetic`` and settings; consecutive ids for ``--shape``."""
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        if args.shape is None:
            ids_T = torch.randint(vocabulary, (context,), generator=torch.Generator().manual_seed(args.seed))
        else:
            ids_T = torch.arange(context) % vocabulary  # similar, where ids follow each other (``shapes``)
        ids_1T = ids_T[None].to(model.device)
        synthetic, prompt = None, context - steps_within(args.steps)
        if args.synthetic:
            synthetic = SyntheticCache(model, ids_1T[:, prompt - PAST :], prompt, batch=args.batch, seed=args.seed)
        return cls(
            ids_1T=ids_1T,
            steps=args.steps,
            batch=args.batch,
            config=offload_config(args),
            seconds=args.seconds,
            synthetic=synthetic,
            limit_bytes=limit_bytes,
        )

    @property
    def context(self) -> int:
        """Tokens of prompt and steps."""
        return self.ids_1T.shape[1]

    @property
    def prompt(self) -> int:
        """Tokens in the cache before the first step."""
        return self.context - steps_within(self.steps)

    @property
    def at_once(self) -> int:
        """Tokens of the longest forward: the prompt, unless caches are filled without one."""
        return self.prompt if self.synthetic is None else 1


def _own_part(weight: Tensor) -> Tensor:
    """This rank's part of a weight that is divided among ranks, else the weight."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def steps_within(timed: int) -> int:
    """Steps at the end of a context: warm-up, timed, profiled."""
    return WARM_UP + timed + PROFILED


def time_setup(model: PreTrainedModel, setup: CacheSetup, work: Workload) -> dict[str, Any]:
    """A row of timings, or the reason it was ``skipped``: out of memory, or the stock model can't run this way."""
    row: dict[str, Any] = {"name": setup.name, "context": work.context, "batch": work.batch}
    ranks = Ranks.of(model)
    sizes = {"context": work.context, "batch": work.batch, "at_once": work.at_once}
    if reason := ranks.first(why_too_large(model, setup, **sizes, limit_bytes=work.limit_bytes, ranks=ranks.count)):
        return row | {"skipped": reason}
    try:
        return row | _time_setup(model, setup, work)
    except (torch.OutOfMemoryError, HostMemoryError, StockModelError) as error:
        if ranks.count > 1 and isinstance(error, torch.OutOfMemoryError):
            raise  # the other ranks may be waiting for this one
        return row | {"skipped": one_line(error, 200)}
    finally:
        release(model.device)


def _time_setup(model: PreTrainedModel, setup: CacheSetup, work: Workload) -> dict[str, Any]:
    """A function of its own: the cache is freed when it returns, so its memory can be released."""
    with open_cache(model, setup, context=work.context, batch=work.batch, config=work.config) as session:
        return _figures(model, session, work)


@torch.no_grad()
def _figures(model: PreTrainedModel, session: CacheSession, work: Workload) -> dict[str, Any]:
    device, engine = model.device, session.engine
    filled_s = -time.perf_counter()
    if work.synthetic is not None:
        work.synthetic.fill(session.cache)
    else:
        model(
            work.ids_1T[:, : work.prompt].expand(work.batch, -1), **with_cache(model, session.cache), logits_to_keep=1
        )
    wait(device)
    filled_s += time.perf_counter()
    tokens = iter(work.ids_1T[:, work.prompt :].expand(work.batch, -1).contiguous().split(1, dim=1))
    for _ in range(WARM_UP):
        session.step(next(tokens))
    wait(device)
    if engine is not None:
        engine.stats.reset()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = _timed(session, tokens, work, device)
    found: dict[str, Any] = {
        "median_ms": statistics.median(times),
        "p95_ms": sorted(times)[math.ceil(0.95 * len(times)) - 1],
        "steps": len(times),
        "filled_s": filled_s,
        "weights_bytes": sum(_own_part(weight).nbytes for weight in model.parameters()),
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
    found |= session.facts()
    if engine is not None:
        stats = engine.stats
        found["engine"] = stats.to_dict()
        found["fetched_bytes_per_token"] = stats.fetched_bytes / max(stats.steps, 1)
        found["exposed_wait_ms_per_token"] = stats.exposed_wait_ms / max(stats.steps, 1)

    def profiled() -> None:
        for _ in range(PROFILED):
            session.step(next(tokens))
            wait(device)

    found["breakdown"] = breakdown(profiled, PROFILED, device)
    return found


def _timed(session: CacheSession, tokens: Iterator[Tensor], work: Workload, device: torch.device) -> list[float]:
    """Milliseconds of each step; the host waits for each, like a loop that reads every token."""
    times: list[float] = []
    while len(times) < work.steps and (len(times) < LEAST or sum(times) < 1000 * work.seconds):
        token_B1 = next(tokens)
        begun = time.perf_counter()
        session.step(token_B1)
        wait(device)
        times.append(1000 * (time.perf_counter() - begun))
    return times
