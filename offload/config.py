"""OffloadConfig: every setting of an attached engine, declared once and validated when it is made.

A field's declaration says which group it belongs to, which values are allowed and what they mean. Validation here, the
options of the command line, the rules of ``attnpred eval`` (both in ``settings.py``) and ``docs/configuration.md`` all
come from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

from attention_predictor.errors import SettingError
from attention_predictor.kinds import Kind, flag, is_whole, number, one_of, sizes_in_bytes, text, whole, whole_numbers
from attention_predictor.offload.policy_names import policy_names

AUTO = "auto"
CALIBRATIONS = ("sketch", "exact", "none")
PREFETCHERS = (AUTO, "thread", "graph", "none")
CAPTURING = (AUTO, "graph")  # prefetchers that capture steps
KERNELS = (AUTO, "none")
LATE_FETCH, LATE_SEQUENCES = 0.25, 2  # of `late_fetch="auto"`: the share for up to so many sequences of a step
CODE_BITS = {AUTO: None, "int8": 8, "int4": 4}  # by `host_kv`
ALLOCATIONS = ("policy", "uniform", "pyramid", "qsim", "cake", "qsim-heads", "cake-heads")
SKETCH_BITS = (1, 2, 4, 8)


GROUPS = {
    "selection": "which blocks a step attends to",
    "prediction": "how block scores are predicted",
    "memory": "where keys and values are stored",
    "execution": "how steps run and what they measure",
}


def setting(group: str, default: Any, kind: Kind, says: str, *, also: str = "") -> Any:
    """A field of ``OffloadConfig``.

    Args:
        group: One of ``GROUPS``.
        kind: Which values are allowed, by themselves.
        says: What the field means, in a line of help.
        also: What other fields ask of a value, in words; ``OffloadConfig`` checks it.
    """
    return field(default=default, metadata={"group": group, "kind": kind, "help": says, "also": also})


def _allocation() -> Kind:
    def is_given(value: object) -> bool:
        return isinstance(value, (tuple, list)) or value in ALLOCATIONS

    allowed = (f"one of {', '.join(ALLOCATIONS)}, or a budget for each layer, such as 768,1280", is_given)
    return Kind(
        read=lambda given: whole_numbers(given) if given[:1].isdigit() else given,
        rules=lambda: [allowed],
        metavar="A",
    )


def _layers() -> Kind:
    def are_layers(value: object) -> bool:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return False
        return all(is_whole(layer) and layer >= 0 for layer in value)

    allowed = ("layer numbers from 0 on, such as 0,1", are_layers)
    return Kind(read=lambda given: whole_numbers(given) if given else [], rules=lambda: [allowed], metavar="L,L")


_SHARE = number("a share from 0 to 1", lambda share: 0 <= share <= 1, "SHARE")
_ANY_SHARE = number("a share from 0 on, such as 0.5", lambda share: share >= 0, "SHARE")
_POWER_OF_TWO = whole(also=("a power of two", lambda size: size > 0 and size.bit_count() == 1))
_EVERY = whole(also=("0 (never), or n for every n-th step", lambda steps: steps >= 0))

_selection, _prediction, _memory, _execution = (partial(setting, group) for group in GROUPS)


@dataclass(kw_only=True, frozen=True, slots=True)
class OffloadConfig:
    """How a model's KV cache is tiered, predicted and fetched.

    Token counts are per KV head. Every error is a ``ConfigError`` that names the field, its value and what is
    allowed.

    Selection: which blocks a step attends to.
        policy: The selection policy; a name in ``offload.policies``.
        budget: Tokens that each KV head attends to in a decoding step, ``sink`` and ``recent`` included.
        budget_allocation: How the budget differs between layers; the mean over layers stays ``budget``. ``"uniform"``:
            all layers get the same; ``"pyramid"``: later layers get less; ``"qsim"``: by the similarity of the prompt's
            queries; ``"cake"``: by the prompt's attention; ``"policy"``: as in the policy's paper; ``"qsim-heads"``,
            ``"cake-heads"``: by KV head too. A list gives one budget for each offloaded layer; in Python, a list in
            place of a layer's budget gives one for each of its KV heads.
        sink: Number of first tokens that are always attended to.
        recent: Number of last tokens that are always attended to.
        late_fetch: Largest share of the budget that a step may fetch after its own query is known, chosen by that query
            and the sketch. 0: all blocks are fetched ahead, by prediction; 1: the sketch may choose all of them.
            ``"auto"``: 0.25 for up to two sequences in a step; of more, each gets so much less that the step waits for
            no more bytes than with two. So tokens depend on the number of sequences, or of ``places``.
        reserve: Blocks resident beyond the budget, as a share of it. A step attends to the best of all resident blocks,
            chosen with its own query. Without a sketch, or with a policy that does not choose again in the step, the
            reserve only saves fetches.
        reserve_ahead: Share of the reserve that is fetched ahead: the best-scored blocks after those of the budget. The
            rest are the blocks that were selected last, which cost no fetch.

    Prediction: how block scores are predicted.
        predictor: ``"default"``, a checkpoint directory, or a rule (``"last"``, ``"ema"``, ``"mean"``).
        history: Number of last prompt queries whose score rows start the history (AttentionPredictor, section 4). A
            predictor may use fewer.
        calibration: Source of the scores of blocks that a step did not attend to. ``"sketch"``: the key sketch, at
            every step; ``"exact"``: all keys, read from host memory every ``calibration_interval`` steps; ``"none"``:
            such blocks get no new scores.
        calibration_interval: Steps between exact calibrations.
        sketch_bits: Bits per key element in the sketch, on average over channels (``KeySketch``).

    Memory: where keys and values are stored.
        block_size: Tokens per block. A trained predictor works with one block size only.
        skip_layers: Layers that keep their whole cache on the device and attend to all of it.
        host_memory: Limit of host (CPU) memory for all caches of the engine together, in each process, in bytes;
            ``None``: what the system reports as available.
        slab_blocks: Blocks per allocation of host memory.
        host_kv: How complete blocks are stored in host memory. ``"auto"``: as the model produced them; ``"int8"``,
            ``"int4"``: as codes of 8 or 4 bits, which take about half or a third of the host memory of a 16-bit model,
            and of the bytes fetched. The block still being written is not coded. Attention to a coded block reads its
            decoded values, even if the budget exceeds the context.

    Execution: how steps run and what they measure.
        prefetch: ``"auto"`` captures the whole decoding step, fetches included, as one CUDA graph if possible; if not,
            a thread fetches while the model computes, and ``stats`` says why. ``"graph"`` does the same, but counts
            steps that are not captured as fallbacks on a CPU too. ``"thread"`` captures nothing. ``"none"`` fetches
            within the step, which waits.
        compile: Captured steps use decoder layers compiled by ``torch.compile``: faster, but they start a minute later.
        unfused: Captured steps run the model's own norms, MLPs and rotary embeddings instead of fused kernels that
            compute the same; slower, for comparisons.
        kernels: ``"auto"`` uses compiled kernels if they can be built (on a GPU by NVRTC, which comes with torch; on a
            CPU by a C++ compiler); ``"none"`` uses torch operations only.
        measure_recovery: Compute the true attention of every n-th step, for ``stats.recovery``; 0: never. Slow, because
            it reads all keys from host memory.

    Raises:
        ConfigError: Names the field, its value and what is allowed.
    """

    policy: str = _selection("predictor", one_of(policy_names), f"selection policy: {', '.join(policy_names())}")
    budget: int = _selection(
        1024, whole(), "tokens that each KV head attends to in a step", also="at least sink + recent + block_size"
    )
    budget_allocation: str | Sequence[int | Sequence[int]] = _selection(
        "policy",
        _allocation(),
        f"how the budget differs between layers: {', '.join(ALLOCATIONS)}, or one budget a layer, such as 768,1280",
        also="their mean must be budget",
    )
    sink: int = _selection(
        64, whole(0), "number of first tokens that are always attended to", also="a multiple of block_size"
    )
    recent: int = _selection(
        64, whole(0), "number of last tokens that are always attended to", also="a multiple of block_size"
    )
    late_fetch: float | str = _selection(
        LATE_FETCH,
        _SHARE.or_name(AUTO),
        "largest share of the budget that a step fetches after its query is known; 0: all blocks are fetched ahead; "
        "auto: less for each the more sequences there are",
    )
    reserve: float = _selection(
        1.0, _ANY_SHARE, "blocks kept on the device beyond the budget, as a share of the budget"
    )
    reserve_ahead: float = _selection(
        0.5, _SHARE, "share of the reserve that is fetched ahead; the rest are the blocks that were selected last"
    )

    predictor: str = _prediction(
        "default",
        text("a name or a directory", "P"),
        "default, a directory written by attnpred train, or a fixed rule: last, ema, mean",
    )
    history: int = _prediction(64, whole(1), "number of last prompt queries whose scores start the history")
    calibration: str = _prediction(
        "sketch",
        one_of(CALIBRATIONS),
        f"source of the scores of blocks that a step did not attend to: {', '.join(CALIBRATIONS)}",
    )
    calibration_interval: int = _prediction(5, whole(1), "steps between exact calibrations")
    sketch_bits: int = _prediction(2, one_of(SKETCH_BITS, int), "bits per key element in the sketch: 1, 2, 4 or 8")

    block_size: int = _memory(16, _POWER_OF_TWO, "tokens per block, a power of two")
    skip_layers: Sequence[int] = _memory(
        (), _layers(), "layers that keep their whole cache on the device, such as 0,1 (default: none)"
    )
    host_memory: int | None = _memory(
        None,
        sizes_in_bytes().or_none(),
        "limit of CPU memory for all caches together, such as 64GiB (default: all that is available)",
    )
    slab_blocks: int = _memory(64, whole(1), "blocks per allocation of CPU memory")
    host_kv: str = _memory(
        AUTO,
        one_of(tuple(CODE_BITS)),
        "complete blocks in CPU memory: auto: unchanged; int8, int4: codes of 8 or 4 bits",
    )

    prefetch: str = _execution(
        AUTO,
        one_of(PREFETCHERS),
        "who fetches blocks: graph (a step is one CUDA graph), thread, or none (the step waits for fetches); "
        "auto: graph if possible, else thread",
    )
    compile: bool = _execution(
        False,
        flag(),
        "compile the layers of captured steps with torch.compile: faster, but starts a minute later",
        also="True only with prefetch auto or graph",
    )
    unfused: bool = _execution(
        False,
        flag(),
        "run norms, MLPs and rotary embeddings of captured steps without fused kernels: slower, for comparisons",
    )
    kernels: str = _execution(
        AUTO, one_of(KERNELS), "auto: compiled kernels if they can be built; none: torch operations only"
    )
    measure_recovery: int = _execution(
        0, _EVERY, "measure attention recovery at every N-th step; 0: never; slow, because it reads all keys"
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            if (expected := one.metadata["kind"].expected(getattr(self, one.name))) is not None:
                self._refuse(one.name, expected)
        for name in ("sink", "recent"):
            value = getattr(self, name)
            if value % self.block_size:
                self._refuse(name, f"a multiple of block_size={self.block_size}")
        least = self.sink + self.recent + self.block_size
        if self.budget < least:
            self._refuse(
                "budget",
                f"at least sink + recent + one block = {self.sink} + {self.recent} + {self.block_size} = {least}",
            )
        if isinstance(self.budget_allocation, (tuple, list)):
            self._check_budgets(self.budget_allocation, least)
        if self.compile and self.prefetch not in CAPTURING:
            self._refuse("compile", f"False, but with prefetch={' or '.join(map(repr, CAPTURING))}")

    def _check_budgets(self, given: Sequence[int | Sequence[int]], least: int) -> None:
        name, size = "budget_allocation", self.block_size
        # Layers with one budget count as many heads as those that have several.
        heads = {len(layer) for layer in given if isinstance(layer, (tuple, list))} or {1}
        if len(heads) > 1:
            self._refuse(name, "as many budgets in each layer that has several")
        (count,) = heads
        layers = [list(layer) if isinstance(layer, (tuple, list)) else [layer] * count for layer in given]
        budgets: list[Any] = [budget for layer in layers for budget in layer]
        if not budgets or not all(is_whole(budget) and budget >= least and budget % size == 0 for budget in budgets):
            self._refuse(name, f"budgets that are multiples of block_size={size} from {least} on")
        mean = self.budget // size * size
        if sum(budgets) != len(budgets) * mean:
            total = f"a total of {len(budgets)} × {mean} (budget={self.budget}) = {len(budgets) * mean}"
            self._refuse(name, f"{total}, found {sum(budgets)}")

    def _refuse(self, name: str, expected: str) -> None:
        raise SettingError(name, getattr(self, name), expected)

    @property
    def needs_sketch(self) -> bool:
        """Whether the predictor policy keeps a key sketch: for calibration, for late fetches, or both."""
        return self.calibration == "sketch" or self.late_share(1) > 0

    def late_share(self, batch: int) -> float:
        """Largest share of the budget that a step of so many sequences fetches late."""
        if isinstance(self.late_fetch, str):
            return LATE_FETCH * min(1.0, LATE_SEQUENCES / batch)
        return self.late_fetch

    @property
    def uses_kernels(self) -> bool:
        """Whether compiled kernels serve where they can be built."""
        return self.kernels == AUTO

    @property
    def code_bits(self) -> int | None:
        """Bits of a code of blocks in host memory; ``None``: blocks are not coded."""
        return CODE_BITS[self.host_kv]

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for logs and result files."""
        return asdict(self)
