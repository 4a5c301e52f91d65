"""Stats: counts and memory figures of an engine."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attention_predictor.errors import IntegrityError
from attention_predictor.sizes import size_text


@dataclass
class Stats:
    """Counts over all layers and sequences since the engine was attached (or ``reset``).

    Attributes:
        steps: Decoding steps, counted in the first tiered layer (one a token).
        captured_steps: How many of them were captured steps (``offload/hf/graph.py``).
        wanted_blocks, hit_blocks: Blocks that attention read, and how many of them were resident before any late
            fetch.
        ahead_blocks, late_blocks: Blocks fetched before and during the step that used them.
        planned_blocks: Blocks selected ahead. Those that were not fetched had stayed resident.
        ahead_bytes, late_bytes, streamed_bytes: Host to device traffic; ``streamed``: keys and values read for full
            attention, exact score rows or the measurement of recovery.
        exposed_wait_ms: Time the generating thread waited for a fetch, ahead or late.
        recovery_sum, relative_recovery_sum, recovery_count: Measured only if ``measure_recovery`` is set.
        device_bytes: Device memory by layer and part at the last step.
        layer_budgets: Budgets in tokens at the last step, by layer or KV head; only of layers that select.
        host_bytes, full_bytes: Host memory of the last step's cache, and its size as a whole on the device, by layer.
        host_kv_bytes: Host memory that all living caches of the engine held together at the last step.
        prefetch: How blocks are fetched ahead on this device, given ``config.prefetch``, and why.
        fused: Modules of the model that captured steps run as one kernel each; empty if fusing is off.
        fallbacks: How often something ran differently from the settings, by message.
        evicts: Whether the policy never selects a dropped block again, by definition; the store still holds it.
        requests: Requests of ``engine.stream`` that have ended, by reason: ``eos``, ``length``, ``cancelled`` or
            ``failed``.
        unfinished_requests: Of the last 100 that were cancelled or failed: a line with its name and why.
    """

    steps: int = 0
    captured_steps: int = 0
    wanted_blocks: int = 0
    hit_blocks: int = 0
    planned_blocks: int = 0
    ahead_blocks: int = 0
    late_blocks: int = 0
    ahead_bytes: int = 0
    late_bytes: int = 0
    streamed_bytes: int = 0
    exposed_wait_ms: float = 0.0
    recovery_sum: float = 0.0
    relative_recovery_sum: float = 0.0
    recovery_count: int = 0
    device_bytes: dict[int, dict[str, int]] = field(default_factory=dict)
    layer_budgets: dict[int, int | tuple[int, ...]] = field(default_factory=dict)
    host_bytes: dict[int, int] = field(default_factory=dict)
    full_bytes: dict[int, int] = field(default_factory=dict)
    host_kv_bytes: int = 0
    prefetch: str = ""
    fused: str = ""
    fallbacks: Counter[str] = field(default_factory=Counter)
    evicts: bool = False
    requests: Counter[str] = field(default_factory=Counter)
    unfinished_requests: deque[str] = field(default_factory=lambda: deque(maxlen=100))

    @property
    def hit_rate(self) -> float | None:
        """Share of attended blocks that were resident before any late fetch; 1 without late fetches."""
        return self.hit_blocks / self.wanted_blocks if self.wanted_blocks else None

    @property
    def reuse_rate(self) -> float | None:
        """Share of the blocks selected ahead that were still resident from the step before."""
        return 1 - self.ahead_blocks / self.planned_blocks if self.planned_blocks else None

    @property
    def fetched_bytes(self) -> int:
        """Bytes fetched ahead and late."""
        return self.ahead_bytes + self.late_bytes

    @property
    def recovery(self) -> float | None:
        """Mean share of true attention mass on the attended blocks."""
        return self.recovery_sum / self.recovery_count if self.recovery_count else None

    @property
    def relative_recovery(self) -> float | None:
        """Mean ratio of recovery to that of the best selection of the same size."""
        return self.relative_recovery_sum / self.recovery_count if self.recovery_count else None

    @property
    def device_kv_bytes(self) -> int:
        """Device memory of pool, sketch, history and other policy state, over all layers."""
        return sum(sum(parts.values()) for parts in self.device_bytes.values())

    @property
    def full_kv_bytes(self) -> int:
        """Size of the same tokens in an ordinary cache on the device."""
        return sum(self.full_bytes.values())

    def device_kv_parts(self) -> dict[str, int]:
        """``device_kv_bytes`` by part."""
        parts: Counter[str] = Counter()
        for layer in self.device_bytes.values():
            parts.update(layer)
        return dict(parts)

    def reset(self) -> None:
        """Reset the counts; memory figures stay."""
        memory = ("device_bytes", "layer_budgets", "host_bytes", "full_bytes", "host_kv_bytes")
        kept = {name: getattr(self, name) for name in (*memory, "prefetch", "fused", "evicts")}
        self.__init__(**kept)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """The main figures as plain values."""
        return {
            "steps": self.steps,
            "captured_steps": self.captured_steps,
            "prefetch": self.prefetch,
            "fused": self.fused,
            "hit_rate": self.hit_rate,
            "reuse_rate": self.reuse_rate,
            "fetched_bytes": self.fetched_bytes,
            "ahead_bytes": self.ahead_bytes,
            "late_bytes": self.late_bytes,
            "streamed_bytes": self.streamed_bytes,
            "exposed_wait_ms": self.exposed_wait_ms,
            "device_kv_bytes": self.device_kv_bytes,
            "device_kv_parts": self.device_kv_parts(),
            "host_kv_bytes": self.host_kv_bytes,
            "full_kv_bytes": self.full_kv_bytes,
            "layer_budgets": [self.layer_budgets[layer] for layer in sorted(self.layer_budgets)],
            "recovery": self.recovery,
            "relative_recovery": self.relative_recovery,
            "fallbacks": dict(self.fallbacks),
            "evicts": self.evicts,
            "requests": dict(self.requests),
            "unfinished_requests": list(self.unfinished_requests),
        }

    def __str__(self) -> str:
        steps = max(self.steps, 1)
        parts = ", ".join(f"{name} {size_text(size)}" for name, size in self.device_kv_parts().items())
        rows = [
            (
                "steps",
                f"{self.steps}, {self.captured_steps} of them captured" if self.captured_steps else str(self.steps),
            ),
            ("prefetch", self.prefetch or "–"),
            ("KV on the device", f"{size_text(self.device_kv_bytes)}{self._share()}" + (f": {parts}" if parts else "")),
            ("KV in host memory", size_text(self.host_kv_bytes)),
            ("hit rate", _percent(self.hit_rate)),
            ("kept from the step before", _percent(self.reuse_rate)),
            (
                "fetched per token",
                f"{size_text(self.fetched_bytes / steps)} (ahead {size_text(self.ahead_bytes / steps)},"
                f" late {size_text(self.late_bytes / steps)})",
            ),
            ("exposed wait per token", f"{self.exposed_wait_ms / steps:.2f} ms"),
        ]
        if self.fused:
            rows.append(("fused in captured steps", self.fused))
        if len(set(self.layer_budgets.values())) > 1:
            rows.append(("budgets by layer", ", ".join(map(str, self.to_dict()["layer_budgets"]))))
        if self.streamed_bytes:
            rows.append(("streamed per token", size_text(self.streamed_bytes / steps)))
        if self.recovery_count:
            relative = _percent(self.relative_recovery)
            rows.append(("recovery", f"{_percent(self.recovery)} ({relative} of the best selection)"))
        if self.evicts:
            rows.append(("evicts", "by definition: what the policy drops is never attended to again"))
        if self.requests:
            rows.append(("requests", ", ".join(f"{count} {reason}" for reason, count in self.requests.items())))
        rows += [("unfinished", line) for line in self.unfinished_requests]
        rows += [(f"fallback ×{count}", message) for message, count in self.fallbacks.items()]
        return "\n".join(f"{name:<26}{value}" for name, value in rows)

    def _share(self) -> str:
        """The device memory as a share of the full cache, or a note if a short context makes it larger."""
        if not self.full_kv_bytes:
            return ""
        if self.device_kv_bytes > self.full_kv_bytes:
            whole = size_text(self.full_kv_bytes)
            return f", more than the {whole} of the full cache (the context is short for this budget)"
        return f" ({self.device_kv_bytes / self.full_kv_bytes:.1%} of the full cache)"


N_COUNTS = 5  # per layer, as `DeviceCounts.of_layer` lists them


class DeviceCounts:
    """Counts that steps keep on the device, until ``Stats`` is read.

    Suffixes: N layers, K counts of a layer.

    Attributes:
        stall_ns_1: int64 nanoseconds for which steps waited for fetches.
    """

    @torch.inference_mode(False)  # inference tensors can't be written to outside of that mode
    def __init__(self, device: torch.device, layers: int) -> None:
        self._all = torch.zeros(1 + N_COUNTS * layers, dtype=torch.int64, device=device)  # one tensor: read by one copy
        self.stall_ns_1, self._counts_NK = _apart(self._all)
        # Counts already in the stats. Device counts are never reset: another thread may be adding to them.
        self._seen = torch.zeros_like(self._all, device="cpu")
        self._block_bytes: dict[int, int] = {}

    def of_layer(self, number: int, block_bytes: int) -> Tensor:
        """int64: blocks attended to, fetched late, chosen ahead, fetched ahead; tokens whose block had no slot."""
        self._block_bytes[number] = block_bytes
        return self._counts_NK[number]

    def move_into(self, stats: Stats) -> None:
        """Add new counts to ``stats``; waits for the device.

        Raises:
            IntegrityError: A token's block had no slot.
        """
        if not self._block_bytes:
            return
        now = self._all.to("cpu", copy=True)
        stall_ns_1, counts_NK = _apart(now - self._seen)
        self._seen = now
        stats.exposed_wait_ms += int(stall_ns_1) / 1e6
        for number, block_bytes in self._block_bytes.items():
            attended, late, planned, ahead, lost = counts_NK[number].tolist()
            if lost:
                raise IntegrityError(f"layer {number}: {lost} tokens were lost because their block had no slot")
            stats.wanted_blocks += attended
            stats.hit_blocks += attended - late
            stats.planned_blocks += planned
            stats.ahead_blocks += ahead
            stats.late_blocks += late
            stats.ahead_bytes += ahead * block_bytes
            stats.late_bytes += late * block_bytes


def _apart(numbers: Tensor) -> tuple[Tensor, Tensor]:
    return numbers[:1], numbers[1:].view(-1, N_COUNTS)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
