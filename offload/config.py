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
ALLOCATIONS = ("policy", "uniform", "pyramid", "qsim", "cake", "qsim-heads", "cake-heads")
SKETCH_BITS = (1, 2, 4, 8)


GROUPS = {
    "selection": "which blocks a step attends to",
    "prediction": "how the scores that select blocks are found",
    "memory": "where keys and values lie",
    "execution": "how steps are run, and what of them is measured",
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
        policy: Who selects the blocks; a name in ``offload.policies``.
        budget: Tokens a decoding step may attend to, ``sink`` and ``recent`` included.
        budget_allocation: How layers share the total of their budgets, which stays ``budget`` a layer. ``"uniform"``:
            each the same; ``"pyramid"``: less from layer to layer; ``"qsim"``: by the similarity of the prompt's
            queries; ``"cake"``: by the prompt's attention; ``"policy"``: as the policy's paper has it;
            ``"qsim-heads"``, ``"cake-heads"``: by KV head as well. A list gives the budget of each offloaded layer
            itself; in Python, a list in place of a layer's budget gives one for each of its KV heads.
        sink: First tokens, always attended to.
        recent: Last tokens, always attended to.
        late_fetch: Largest share of the budget that may be fetched within the step that uses it, chosen with the
            current query and the sketch; 0 predicts ahead only, 1 lets the sketch choose all.
        reserve: Blocks resident beyond the budget, as a share of it. Half of them are fetched ahead, the best after the
            budget's own; half are what was wanted last. A step attends to the best of all resident blocks, chosen with
            the current query; without a sketch (or with a policy that does not choose) the reserve saves fetches alone.

    Prediction: how the scores that select blocks are found.
        predictor: ``"default"``, a checkpoint directory, or a rule (``"last"``, ``"ema"``, ``"mean"``).
        history: Prompt queries whose score rows start the history (AttentionPredictor, section 4); a predictor may
            make use of fewer.
        calibration: How the history learns of blocks that were not attended to. ``"sketch"``: from the key sketch, at
            every step; ``"exact"``: from all keys, read from host memory every ``calibration_interval`` steps;
            ``"none"``: not at all.
        calibration_interval: Steps from one exact calibration to the next.
        sketch_bits: Bits of a key element in the sketch, on average over channels (``KeySketch``).

    Memory: where keys and values lie.
        block_size: Tokens in a block. A trained predictor is for one block size.
        skip_layers: Layers left as they are, with their whole cache on the device.
        host_memory: Bytes of host memory the cache may use, in each process; ``None`` takes what the system reports as
            available.
        slab_blocks: Blocks by which host memory grows.

    Execution: how steps are run, and what of them is measured.
        prefetch: ``"auto"`` captures whole decoding steps, fetches included, as one CUDA graph, wherever that can be;
            elsewhere a thread fetches beside the computation, and ``stats`` says why. ``"graph"`` is the same, and
            counts a step that is not captured as a fallback on a CPU too. ``"thread"`` captures nothing; ``"none"``
            fetches in the middle of the computation.
        compile: Captured steps are made of compiled decoder layers (``torch.compile``): faster, after a minute's wait.
        unfused: Captured steps run the model's own norms, MLPs and rotary embeddings, operation by operation, in place
            of kernels that compute the same; for comparisons.
        kernels: ``"auto"`` uses compiled kernels where they can be built (on a GPU by NVRTC, which torch brings; on a
            CPU by a C++ compiler), ``"none"`` plain torch operations alone.
        measure_recovery: Compute the true attention of every n-th step, for ``stats.recovery``; 0: never. Slow: it
            reads all keys from host memory.

    Raises:
        ConfigError: Names the field, its value and what is allowed.
    """

    policy: str = _selection(
        "predictor", one_of(policy_names), f"who selects the blocks: one of {', '.join(policy_names())}"
    )
    budget: int = _selection(
        1024, whole(), "tokens a step attends to, per KV head", also="at least sink + recent + block_size"
    )
    budget_allocation: str | Sequence[int | Sequence[int]] = _selection(
        "policy",
        _allocation(),
        f"how layers share it: {', '.join(ALLOCATIONS)}, or each layer's, such as 768,1280",
        also="their mean must be budget",
    )
    sink: int = _selection(64, whole(0), "first tokens, always attended to", also="a multiple of block_size")
    recent: int = _selection(64, whole(0), "last tokens, always attended to", also="a multiple of block_size")
    late_fetch: float = _selection(
        0.25, _SHARE, "share of the budget that may be fetched within a step: 0 none, 1 all that the sketch chooses"
    )
    reserve: float = _selection(0.5, _ANY_SHARE, "blocks kept beyond the budget to choose among, as a share of it")

    predictor: str = _prediction(
        "default",
        text("a name or a directory", "P"),
        "default, a directory that train wrote, or a rule: last, ema, mean",
    )
    history: int = _prediction(64, whole(1), "prompt queries whose scores start the history")
    calibration: str = _prediction(
        "sketch",
        one_of(CALIBRATIONS),
        f"how scores of blocks that were not attended to are learned: one of {', '.join(CALIBRATIONS)}",
    )
    calibration_interval: int = _prediction(5, whole(1), "steps from one exact calibration to the next")
    sketch_bits: int = _prediction(2, one_of(SKETCH_BITS, int), "bits of a key element in the sketch: 1, 2, 4 or 8")

    block_size: int = _memory(16, _POWER_OF_TWO, "tokens in a block, a power of two")
    skip_layers: Sequence[int] = _memory((), _layers(), "layers whose whole cache stays on the device, such as 0,1")
    host_memory: int | None = _memory(
        None, sizes_in_bytes().or_none(), "host memory the cache may use, such as 64GiB; none: what is available"
    )
    slab_blocks: int = _memory(64, whole(1), "blocks by which host memory grows")

    prefetch: str = _execution(
        AUTO,
        one_of(PREFETCHERS),
        "auto: steps captured as CUDA graphs where they can be, else thread; graph, thread, or none: within the step",
    )
    compile: bool = _execution(
        False,
        flag(),
        "compile the model's layers for captured steps: faster, after a minute's wait",
        also="True only with prefetch auto or graph",
    )
    unfused: bool = _execution(
        False, flag(), "captured steps run the model's small operations one by one: slower, for comparisons"
    )
    kernels: str = _execution(
        AUTO, one_of(KERNELS), "auto: compiled kernels where they can be built; none: torch alone"
    )
    measure_recovery: int = _execution(
        0, _EVERY, "measure recovery at every n-th step; 0: never (slow: it reads all keys)"
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
        return self.calibration == "sketch" or self.late_fetch > 0

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for logs and result files."""
        return asdict(self)
