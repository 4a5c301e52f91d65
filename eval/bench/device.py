"""Waits for a device, and frees its memory between timings."""

from __future__ import annotations

import gc

import torch


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
