"""Experts of a mixture, computed in a way that can be captured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedConfig

# transformers' ways to compute experts for which the host must know which tokens go where, at least in some precisions,
# and one for which it need not: it gathers the weights of those chosen. `generate` takes it too to decode on GPUs.
ASKING, CAPTURABLE = ("eager", "grouped_mm"), "batched_mm"


@contextmanager
def capturable_experts(config: PreTrainedConfig) -> Iterator[None]:
    """Within it, the experts of the model with this configuration don't ask the host."""
    before = getattr(config, "_experts_implementation", None)
    if before not in ASKING:
        yield
        return
    config._experts_implementation = CAPTURABLE
    try:
        yield
    finally:
        config._experts_implementation = before
