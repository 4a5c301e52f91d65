"""Opens a cache of a given setup (``cache_setups.py``), with a function that takes one decoding step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from attention_predictor.errors import one_line
from attention_predictor.eval.bench.cache_setups import CACHE_SETUPS, CacheSetup, named_setup, names_in
from attention_predictor.eval.bench.resident_step import ResidentStep, resident, resident_cache
from attention_predictor.eval.bench.static_step import StaticStep, StockModelError, plain_static_cache
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.engine import Engine
from attention_predictor.offload.hf.attach import attach
from attention_predictor.offload.hf.versions import layer_config, with_cache
from attention_predictor.sizes import size_text


def choose_setups(names: str | None, device: torch.device) -> list[str]:
    """Setups named in ``--ways`` (``"graph,device"``), or all that this device can run, in the table's order.

    Raises:
        ConfigError: An unknown name, or one that can't be measured here.
    """
    if names is None:
        setups = {name: setup for name, setup in CACHE_SETUPS.items() if setup.by_default}
        if device.type != "cuda":
            setups = {name: setup for name, setup in setups.items() if not setup.needs_gpu and setup.kind != "static"}
        return list(setups)
    asked = names_in(names)
    for name in asked:
        named_setup(name, CACHE_SETUPS, device.type)
    return [name for name in CACHE_SETUPS if name in asked]


@dataclass
class CacheSession:
    """An open cache and a function that takes one decoding step."""

    cache: Cache
    step: Callable[[Tensor], object]
    engine: Engine | None = None
    facts: Callable[[], dict[str, Any]] = dict  # for the row of timings, after the steps


@contextmanager
def open_cache(
    model: PreTrainedModel, setup: CacheSetup, *, context: int, batch: int, config: OffloadConfig
) -> Iterator[CacheSession]:
    """An empty cache for ``context`` tokens; the model stays attached, or compiled, within the ``with`` block.

    ``config``: of our caches; the setup's own settings come first.
    """
    stock = model.config.get_text_config(decoder=True)
    with ExitStack() as stack:
        if setup.options.get("compile"):
            stack.callback(torch.compiler.reset)  # with what was compiled goes the memory that its graphs hold
        if setup.kind == "ours":
            engine = stack.enter_context(attach(model, replace(config, **setup.options)))
            engine.check_fits(batch=batch, tokens=context)
            cache: Cache = engine.new_cache()
            yield CacheSession(cache, lambda token_B1: model(token_B1, **with_cache(model, cache)), engine)
        elif setup.kind == "resident":
            cache = resident_cache(model, context)
            stack.enter_context(resident(model))
            resident_step = ResidentStep(model, cache, batch, compiled=setup.options.get("compile", False))
            yield CacheSession(cache, resident_step, facts=resident_step.facts)
        elif setup.kind == "dynamic":
            cache = DynamicCache(config=stock, **setup.options)
            yield CacheSession(cache, lambda token_B1: model(token_B1, **with_cache(model, cache)))
        elif not setup.options.get("compile"):
            cache = plain_static_cache(model, context)
            yield CacheSession(cache, StaticStep(model, cache, context, batch))
        else:
            cache = StaticCache(config=stock, max_cache_len=context)
            forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

            def step(token_B1: Tensor) -> object:
                torch.compiler.cudagraph_mark_step_begin()  # the last step's logits may be overwritten
                try:
                    return forward(token_B1, **with_cache(model, cache))
                except torch._dynamo.exc.TorchDynamoException as error:
                    raise StockModelError(f"the stock model can't be compiled: {one_line(error, 200)}") from error

            yield CacheSession(cache, step)


def why_too_large(
    model: PreTrainedModel,
    setup: CacheSetup,
    *,
    context: int,
    batch: int,
    at_once: int,
    limit_bytes: int | None,
    ranks: int = 1,
) -> str | None:
    """Why a stock cache of this size does not fit, else ``None``; ours checks itself (``engine.check_fits``).

    ``at_once``: tokens of the longest forward; ``ranks``: among how many processes the KV heads are divided.
    """
    if setup.kind == "ours":
        return None
    device = model.device
    layers = [batch * nbytes // ranks for nbytes in _layer_bytes(model, setup, context, at_once)]
    needed = sum(layers)
    if setup.kind != "resident":
        needed += max(layers, default=0)  # a step makes one layer's anew before the old one is gone
    if device.type != "cuda" or setup.options.get("offloading"):
        available, where = psutil.virtual_memory().available, "host memory"
    else:
        available, where = free_device_bytes(device, limit_bytes), "device memory"
    if needed <= available:
        return None
    return f"keys and values take {size_text(needed)} of {where}, {size_text(available)} are available"


def free_device_bytes(device: torch.device, limit_bytes: int | None) -> int:
    """Bytes that torch can still allocate on a GPU; ``limit_bytes``: as of ``limit_memory``."""
    used = torch.cuda.memory_allocated(device)
    available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - used
    return available if limit_bytes is None else min(available, limit_bytes - used)


def _layer_bytes(model: PreTrainedModel, setup: CacheSetup, context: int, at_once: int) -> list[int]:
    """Bytes of one sequence's keys and values in each layer that keeps them token by token.

    With a window a layer of a dynamic cache keeps the last tokens before a forward, and that forward's; one of a
    static cache the window, but in a ``plain_static_cache`` everything.
    """
    config = model.config.get_text_config(decoder=True)
    found = []
    for number, layer in enumerate(DynamicCache(config=config).layers):
        if not isinstance(layer, DynamicLayer):
            continue  # a state of fixed size, or the keys of another layer
        tokens = context
        if isinstance(layer, DynamicSlidingWindowLayer):
            if setup.kind == "dynamic":
                tokens = min(context, layer.sliding_window - 1 + at_once)
            elif setup.options.get("compile"):
                tokens = min(context, layer.sliding_window)
        own = layer_config(config, number)
        heads = getattr(own, "num_key_value_heads", None) or own.num_attention_heads
        head_dim = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
        found.append(2 * heads * head_dim * model.dtype.itemsize * tokens)
    return found
