"""Waits for a device, and frees its memory between timings."""

from __future__ import annotations

import gc

import torch

from attention_predictor.errors import ConfigError
from attention_predictor.sizes import size_text


def wait(device: torch.device) -> None:
    """Wait until a GPU has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Free cached device memory and pinned memory for the next timing."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # older versions of torch have no public name for it
        torch.cuda.reset_peak_memory_stats(device)


def limit_memory(gib: float | None, device: torch.device) -> int | None:
    """Let torch use so much of a GPU's memory (``--memory-limit``); the same in bytes. ``None``: no limit.

    Raises:
        ConfigError: The device is no GPU, or has less.
    """
    if gib is None:
        return None
    if device.type != "cuda":
        raise ConfigError(f"--memory-limit {gib}: for CUDA devices, found {device}")
    total = torch.cuda.get_device_properties(device).total_memory
    if not 0 < gib * 2**30 <= total:
        raise ConfigError(f"--memory-limit {gib}: expected more than 0 and at most {size_text(total)}")
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total, device.index)
    return int(gib * 2**30)
