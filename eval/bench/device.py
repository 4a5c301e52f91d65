"""A device between timings: done with its work, and free of what the last way held."""

from __future__ import annotations

import gc

import torch


def wait(device: torch.device) -> None:
    """Until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what the last way held, pinned memory included: the next one needs it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # older versions of torch have no public name for it
        torch.cuda.reset_peak_memory_stats(device)
