"""The project's own policy: a learned predictor chooses ahead, a key sketch calibrates it and corrects it late.

AttentionPredictor (NeurIPS 2025, arXiv 2502.04077, section 4) predicts the next step's block scores from their
history. Blocks that a sparse step did not attend to have no score of their own; what the history is told about them is
the *calibration*: an estimate from the 2-bit keys at every step, the truth at every few steps, or nothing.

Suffixes: B sequences, G KV heads, H query heads, Q queries, T tokens, L tokens of the sequence, D head size, S slots,
N blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attention_predictor.offload.attention.dense import ScoreRows
from attention_predictor.offload.policies.base import LayerSpec, Part, Policy, ReadKeys, Step
from attention_predictor.offload.policies.selection import Selection
from attention_predictor.predictor.history import row_of_logits
from attention_predictor.predictor.model import new_history
from attention_predictor.predictor.sketch import KeySketch

if TYPE_CHECKING:
    from attention_predictor.offload.config import OffloadConfig


class Predictor(Policy):
    """Predicted block scores for the next token; the sketch's estimate for a bounded late fetch."""

    name = "predictor"
    selects = "ahead"

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        assert spec.predictor is not None  # attach loads it for this policy
        config = spec.config
        self.prompt_rows = min(config.history, spec.predictor.rows)
        self.history = new_history(
            spec.predictor,
            batch=spec.batch,
            kv_heads=spec.kv_heads,
            device=spec.device,
            kernels=config.kernels == "auto",
        )
        self.sketch = (
            KeySketch(
                batch=spec.batch,
                kv_heads=spec.kv_heads,
                head_dim=spec.head_dim,
                dtype=spec.dtype,
                device=spec.device,
                bits=config.sketch_bits,
            )
            if config.needs_sketch
            else None
        )
        self.steps = 0
        self.estimate: tuple[Step, Tensor, Tensor] | None = None  # a step and its estimated peaks and sums

    @property
    def parts(self) -> dict[str, Part]:
        return {"history": self.history} | ({"sketch": self.sketch} if self.sketch is not None else {})

    @property
    def late_share(self) -> float:
        return self.spec.config.late_fetch

    @property
    def chooses(self) -> bool:
        return self.sketch is not None and (self.late_share > 0 or self.spec.config.reserve > 0)

    @classmethod
    def never_captured(cls, config: OffloadConfig) -> str | None:
        if config.calibration != "sketch":
            return f"captured steps calibrate by the sketch, calibration is {config.calibration!r}"
        if config.measure_recovery:
            return "recovery is measured by reading all keys, which the host does"
        return None

    @property
    def no_graph(self) -> str | None:
        if (reason := super().no_graph) is not None:
            return reason
        assert self.sketch is not None
        return self.history.no_graph or self.sketch.no_kernel(self.spec.config.block_size)

    @property
    def is_started(self) -> bool:
        return self.history.started and (self.sketch is None or self.sketch.length >= self.sketch.group)

    def reserve(self, tokens: int) -> None:
        self.history.reserve(-(-tokens // self.spec.config.block_size))
        if self.sketch is not None:
            self.sketch.reserve(tokens)

    def extend(self, key_BGTD: Tensor, query_BHQD: Tensor) -> None:
        if self.sketch is not None:
            self.sketch.extend(key_BGTD, query_BHQD, kernel=self.spec.config.kernels == "auto")

    def observe_rows(self, rows: ScoreRows) -> None:
        if self.history.started:
            self.history.extend(rows.scores_BGQN)
        else:
            self.history.start(rows.scores_BGQN)

    def score_now(self, step: Step) -> Tensor:
        _, sum_BHN = self._estimated(step)
        share_BHN = torch.exp(sum_BHN - torch.logsumexp(sum_BHN, -1, keepdim=True))
        return share_BHN.unflatten(1, (self.spec.kv_heads, -1)).mean(2)

    def observe(self, step: Step) -> None:
        self.steps += 1
        self.tell_history(step)
        self.estimate = None

    def tell_history(self, step: Step) -> None:
        """Fold this step's row into the history."""
        if self._reads_all_keys:
            self.history.push(self.row(step))
        else:
            self.history.push_slots(*self._logits(step))

    def row(self, step: Step) -> Tensor:
        """What the history is told of this step, ``[B, G, N]``."""
        return step.exact.scores_BGQN[:, :, 0] if self._reads_all_keys else row_of_logits(*self._logits(step))

    @property
    def _reads_all_keys(self) -> bool:
        config = self.spec.config
        return config.calibration == "exact" and self.steps % config.calibration_interval == 0

    def score_next(self, length: int) -> Tensor | None:
        first, last = Selection.of(self.spec.config).candidates(length)
        if not self.history.started or first >= last:
            return None  # every block is sink or recent
        padding_B = None if self.padding_B is None else self.padding_B // self.spec.config.block_size
        return self.history.predict(first, min(last, self.history.n_blocks), padding_B)

    def _logits(self, step: Step) -> tuple[Tensor | None, Tensor, Tensor, Tensor, int]:
        """This step's row, as ``row_of_logits`` takes it: exact where it attended, estimated or zero elsewhere."""
        peak_BHN, total_BH = None, step.attention.lse_BH
        if self.spec.config.calibration == "sketch":
            peak_BHN, sum_BHN = self._estimated(step)
            attended_BHN = step.attended_BGN.repeat_interleave(sum_BHN.shape[1] // self.spec.kv_heads, 1)
            rest_BH = torch.logsumexp(sum_BHN.masked_fill(attended_BHN, float("-inf")), -1)
            total_BH = torch.logaddexp(total_BH, rest_BH)
        return peak_BHN, step.block_BGS, step.attention.scores.peak_BHS, total_BH, step.n_blocks

    def _estimated(self, step: Step) -> tuple[Tensor, Tensor]:
        """Peak and log-sum-exp ``[B, H, N]`` of each block's logits, made once a step.

        By the sketch; where it chooses, exactly for what is resident: those keys are at hand, and the sketch's noise
        must not make it leave out a block that is there.
        """
        assert self.sketch is not None
        if self.estimate is None or self.estimate[0] is not step:
            peak_BHN, sum_BHN = self.sketch.block_scores(
                step.query_BHD,
                step.terms.scaling,
                step.terms.softcap,
                block_size=self.spec.config.block_size,
                real_BL=step.real_BL,
                kernel=step.kernel,
            )
            if self.chooses:
                peak_BHN = _put(peak_BHN, step.resident_BGS, step.resident_scores.peak_BHS)
                sum_BHN = _put(sum_BHN, step.resident_BGS, step.resident_scores.sum_BHS)
            self.estimate = (step, peak_BHN, sum_BHN)
        return self.estimate[1:]

    def crop(self, length: int, read_keys: ReadKeys) -> None:
        # Rows that rejected tokens added stay in the history: they cost nothing but a little of its sharpness.
        self.history.crop(-(-length // self.spec.config.block_size))
        if self.sketch is not None:
            start = self.sketch.tail_start(length)
            self.sketch.crop(length, read_keys(start, length).to(self.spec.device))


def _put(x_BHN: Tensor, block_BGS: Tensor, slot_BHS: Tensor) -> Tensor:
    """``x_BHN`` with the values of slots in the places of their blocks."""
    H, N = x_BHN.shape[1:]
    # Slots that hold no block write to one column more, which is cut off.
    index_BHS = (block_BGS % (N + 1)).repeat_interleave(H // block_BGS.shape[1], 1)
    return torch.nn.functional.pad(x_BHN, (0, 1)).scatter(-1, index_BHS, slot_BHS)[..., :-1].contiguous()
