"""Mixture-of-experts implementations that can be captured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedConfig

# transformers' implementations that read the routing on the host, at least in some precisions; and one that does not:
# it gathers the chosen experts' weights. `generate` also uses it to decode on GPUs.
SYNCHRONISING, CAPTURABLE = ("eager", "grouped_mm"), "batched_mm"


@contextmanager
def capturable_experts(config: PreTrainedConfig) -> Iterator[None]:
    """Within it, experts of the model with this configuration need no host synchronisation."""
    before = getattr(config, "_experts_implementation", None)
    if before not in SYNCHRONISING:
        yield
        return
    config._experts_implementation = CAPTURABLE
    try:
        yield
    finally:
        config._experts_implementation = before
