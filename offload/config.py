"""OffloadConfig: every setting of an attached engine, validated when it is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attention_predictor.predictor.errors import ConfigError

CALIBRATIONS = ("sketch", "exact", "none")
PREFETCHERS = ("auto", "thread", "graph", "none")
KERNELS = ("auto", "none")
ALLOCATIONS = ("policy", "uniform", "pyramid", "qsim", "cake", "qsim-heads", "cake-heads")
SKETCH_BITS = (1, 2, 4, 8)


@dataclass(kw_only=True, frozen=True, slots=True)
class OffloadConfig:
    """How a model's KV cache is tiered, predicted and fetched.

    Token counts are per KV head. Every error is a ``ConfigError`` that names the field, its value and what is
    allowed.

    Attributes:
        budget: Tokens a decoding step may attend to, ``sink`` and ``recent`` included.
        budget_allocation: How layers share the total of their budgets, which stays ``budget`` a layer:
            ``"uniform"``ly, falling as a ``"pyramid"``, by the similarity of a prompt's queries (``"qsim"``), by its
            attention (``"cake"``), or as the ``"policy"``'s paper has it; ``"qsim-heads"`` and ``"cake-heads"`` go by
            KV head. Or the budgets themselves, for each layer that is offloaded one, or one for each of its KV heads
            (``offload/allocation.py``).
        block_size: Tokens in a block; a power of two.
        sink: First tokens, always attended.
        recent: Last tokens, always attended.
        history: Prompt queries whose score rows start the history (AttentionPredictor, section 4); a predictor may
            make use of fewer.
        policy: Who selects the blocks; a name in ``offload.policies``.
        predictor: ``"default"``, a checkpoint directory, or a rule (``"last"``, ``"ema"``, ``"mean"``).
        calibration: How the history learns of blocks that were not attended: from the key ``sketch`` at every step,
            ``exact``ly every ``calibration_interval`` steps (reads all keys from host memory), or ``none``.
        calibration_interval: Steps from one exact calibration to the next.
        sketch_bits: Bits of a key element in the sketch, on average over channels (``KeySketch``).
        late_fetch: Largest share of the budget that may be fetched within the step that uses it, chosen with the
            current query and the sketch; 0 predicts ahead only, 1 lets the sketch choose all.
        reserve: Blocks resident beyond the budget, as a share of it. Half of them are fetched ahead, the best after the
            budget's own; half are what was wanted last. A step attends to the best of all resident blocks, chosen with
            the current query; without a sketch (or with a policy that does not choose) the reserve saves fetches alone.
        prefetch: ``"auto"`` captures whole decoding steps, fetches included, as one CUDA graph, wherever that can be;
            elsewhere a thread fetches beside the computation, and ``stats`` says why. ``"graph"`` is the same, and
            counts a step that is not captured as a fallback on a CPU too. ``"thread"`` captures nothing; ``"none"``
            fetches in the middle of the computation.
        compile: Captured steps are made of compiled decoder layers (``torch.compile``): faster, after a minute's wait.
        kernels: ``"auto"`` uses compiled kernels where they can be built (on a GPU by NVRTC, which torch brings; on a
            CPU by a C++ compiler), ``"none"`` plain torch operations alone.
        skip_layers: Layers left as they are, with their whole cache on the device.
        slab_blocks: Blocks by which host memory grows.
        host_memory: Bytes of host memory the cache may use; ``None`` takes what the system reports as available.
        measure_recovery: Compute the true attention of every n-th step, for ``stats.recovery``; 0 of none. Slow: it
            streams all keys through.
    """

    budget: int = 1024
    budget_allocation: str | Sequence[int | Sequence[int]] = "policy"
    block_size: int = 16
    sink: int = 64
    recent: int = 64
    history: int = 64
    policy: str = "predictor"
    predictor: str = "default"
    calibration: str = "sketch"
    calibration_interval: int = 5
    sketch_bits: int = 2
    late_fetch: float = 0.25
    reserve: float = 0.5
    prefetch: str = "auto"
    compile: bool = False
    kernels: str = "auto"
    skip_layers: Sequence[int] = ()
    slab_blocks: int = 64
    host_memory: int | None = None
    measure_recovery: int = 0

    def __post_init__(self) -> None:
        # Imported here: the policies are built from a config.
        from attention_predictor.offload.policies import policy_names

        for name in ("budget", "block_size", "sink", "recent", "history", "calibration_interval", "slab_blocks"):
            self._check(name, _is_int(getattr(self, name)), "an integer")
        self._check("block_size", self.block_size > 0 and self.block_size.bit_count() == 1, "a power of two")
        for name in ("sink", "recent"):
            value = getattr(self, name)
            self._check(
                name, value >= 0 and value % self.block_size == 0, f"a multiple of block_size={self.block_size}"
            )
        least = self.sink + self.recent + self.block_size
        self._check(
            "budget",
            self.budget >= least,
            f"at least sink + recent + one block = {self.sink} + {self.recent} + {self.block_size} = {least}",
        )
        self._check_allocation(least)
        for name in ("history", "calibration_interval", "slab_blocks"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("policy", self.policy in policy_names(), _one_of(policy_names()))
        self._check("predictor", isinstance(self.predictor, str) and self.predictor != "", "a name or a directory")
        self._check("calibration", self.calibration in CALIBRATIONS, _one_of(CALIBRATIONS))
        self._check("sketch_bits", self.sketch_bits in SKETCH_BITS, _one_of(SKETCH_BITS))
        self._check("late_fetch", _is_number(self.late_fetch) and 0 <= self.late_fetch <= 1, "a share from 0 to 1")
        holds = _is_number(self.reserve) and 0 <= self.reserve < math.inf
        self._check("reserve", holds, "a share from 0 on, such as 0.5")
        self._check("prefetch", self.prefetch in PREFETCHERS, _one_of(PREFETCHERS))
        self._check("compile", isinstance(self.compile, bool), "True or False")
        captures = self.prefetch in ("auto", "graph")
        self._check("compile", not self.compile or captures, "False, but with prefetch='auto' or 'graph'")
        self._check("kernels", self.kernels in KERNELS, _one_of(KERNELS))
        holds = isinstance(self.skip_layers, Sequence) and all(_is_int(i) and i >= 0 for i in self.skip_layers)
        self._check("skip_layers", holds, "layer numbers from 0 on, such as (0, 1)")
        holds = _is_int(self.measure_recovery) and self.measure_recovery >= 0
        self._check("measure_recovery", holds, "0 (never), or n for every n-th step")
        self._check(
            "host_memory",
            self.host_memory is None or (_is_int(self.host_memory) and self.host_memory > 0),
            "a positive number of bytes, or None",
        )

    def _check_allocation(self, least: int) -> None:
        name, given, size = "budget_allocation", self.budget_allocation, self.block_size
        if not isinstance(given, (tuple, list)):
            self._check(name, given in ALLOCATIONS, f"{_one_of(ALLOCATIONS)}, or a budget for each layer")
            return
        # Layers with one budget count as many heads as those that have several.
        heads = {len(layer) for layer in given if isinstance(layer, (tuple, list))} or {1}
        self._check(name, len(heads) == 1, "as many budgets in each layer that has several")
        (count,) = heads
        layers = [list(layer) if isinstance(layer, (tuple, list)) else [layer] * count for layer in given]
        budgets = [budget for layer in layers for budget in layer]
        holds = len(budgets) > 0 and all(
            _is_int(budget) and budget >= least and budget % size == 0 for budget in budgets
        )
        self._check(name, holds, f"budgets that are multiples of block_size={size} from {least} on")
        mean = self.budget // size * size
        total = f"a total of {len(budgets)} × {mean} (budget={self.budget}) = {len(budgets) * mean}"
        self._check(name, sum(budgets) == len(budgets) * mean, f"{total}, found {sum(budgets)}")

    def _check(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ConfigError(f"{name}={getattr(self, name)!r} is not allowed: expected {allowed}")

    @property
    def needs_sketch(self) -> bool:
        """Whether the predictor policy keeps a key sketch: for calibration, for late fetches, or both."""
        return self.calibration == "sketch" or self.late_fetch > 0

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for logs and result files."""
        return asdict(self)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _one_of(names: Sequence[object]) -> str:
    return "one of " + ", ".join(str(name) for name in names)
