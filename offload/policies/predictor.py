"""The default policy: a learned predictor selects blocks ahead; a key sketch corrects the selection.

AttentionPredictor (NeurIPS 2025, arXiv 2502.04077, section 4) predicts the next step's block scores from past ones. A
sparse step computes no scores of the blocks it did not attend to. *Calibration* supplies them to the history: estimates
from the 2-bit keys at every step, true scores every few steps, or nothing.

Suffixes: B sequences, G KV heads, H query heads, Q queries, T tokens, L tokens of the sequence, D head size, S slots,
N blocks, C block capacity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention_predictor.arithmetic import ceil_div
from attention_predictor.csrc.ops import Estimates
from attention_predictor.offload.attention.dense import ScoreRows
from attention_predictor.offload.blocks.extent import Extent
from attention_predictor.offload.policies.base import LayerSpec, Part, Policy, ReadKeys, Step
from attention_predictor.predictor.history import row_of_logits
from attention_predictor.predictor.model import new_history
from attention_predictor.predictor.sketch import KeySketch


class PredictorPolicy(Policy):
    """Selects ahead by predicted block scores, and late, up to a limit, by the sketch's estimates."""

    name = "predictor"
    selects = "ahead"

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        assert spec.predictor is not None  # attach loads it for this policy
        config = spec.config
        self.kernels = config.uses_kernels
        self.prompt_rows = min(config.history, spec.predictor.rows)
        self.history = new_history(
            spec.predictor,
            batch=spec.batch,
            kv_heads=spec.kv_heads,
            device=spec.device,
            kernels=self.kernels,
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
        self.length = self.steps = 0  # tokens, and decoding steps, as the host counts them
        self.size = config.block_size

    @property
    def parts(self) -> dict[str, Part]:
        return {"history": self.history} | ({"sketch": self.sketch} if self.sketch is not None else {})

    def late_share(self, batch: int) -> float:
        return self.spec.config.late_share(batch)

    @property
    def chooses(self) -> bool:
        return self.sketch is not None and (self.late_share(1) > 0 or self.spec.config.reserve > 0)

    def why_no_kernel(self) -> str | None:
        return None if self.sketch is None else self.sketch.why_no_kernel(self.size)

    @property
    def may_read_all_keys(self) -> bool:
        return self.spec.config.calibration == "exact"

    @property
    def reads_all_keys(self) -> bool:
        config = self.spec.config
        return self.may_read_all_keys and self.steps % config.calibration_interval == 0

    @property
    def is_started(self) -> bool:
        return self.history.started and (self.sketch is None or self.sketch.length >= self.sketch.group)

    def reserve(self, capacity: int) -> None:
        self.history.reserve(capacity)
        if self.sketch is not None:
            self.sketch.reserve(capacity * self.size)

    def advance(self) -> None:
        self.steps += 1
        self.length += 1
        self.history.advance(ceil_div(self.length, self.size))
        if self.sketch is not None:
            self.sketch.advance()

    def extend(self, key_BGTD: Tensor, query_BHQD: Tensor) -> None:
        self.length += key_BGTD.shape[2]
        if self.sketch is not None:
            self.sketch.extend(key_BGTD, query_BHQD, kernel=self.kernels)

    def append(self, key_BGD: Tensor, query_BHD: Tensor, extent: Extent) -> None:
        if self.sketch is not None:
            self.sketch.append(key_BGD, query_BHD, extent.length_B, kernel=self.kernels)

    def observe_rows(self, rows: ScoreRows) -> None:
        if self.history.started:
            self.history.extend(rows.scores_BGQN)
        else:
            self.history.start(rows.scores_BGQN)

    def score_now(self, step: Step) -> Estimates | None:
        """The sketch's estimates; the step replaces those of resident blocks by exact scores."""
        if self.sketch is None:
            return None
        return Estimates(
            *self.sketch.block_scores(
                step.query_BHD,
                step.terms.scaling,
                step.terms.softcap,
                block_size=self.size,
                real_BL=step.real_BL,
                kernel=step.kernel,
                capacity=step.extent.capacity,
                length_B=step.extent.length_B,
            )
        )

    def observe(self, step: Step) -> None:
        if self.reads_all_keys:
            self.history.push(self.row(step))
            return
        peak_BHC, rest_BH = self._estimates(step)
        self.history.observe_slots(peak_BHC, *self._attended(step), step.extent.length_B, rest_BH)

    def row(self, step: Step) -> Tensor:
        """The score row that the history observes, ``[B, G, C]``; of an exact step, ``[B, G, N]``."""
        if self.reads_all_keys:
            return step.exact.scores_BGQN[:, :, 0]
        (peak_BHC, rest_BH), (block_BGS, slot_peak_BHS, total_BH) = self._estimates(step), self._attended(step)
        if rest_BH is not None:
            total_BH = torch.logaddexp(total_BH, rest_BH)
        return row_of_logits(peak_BHC, block_BGS, slot_peak_BHS, total_BH, step.extent.capacity)

    def _estimates(self, step: Step) -> tuple[Tensor | None, Tensor | None]:
        """Estimated peaks and log-sum-exp of the blocks that the step did not attend to; ``None`` without sketch
        calibration."""
        if self.spec.config.calibration != "sketch":
            return None, None
        assert step.estimates is not None
        return step.estimates.peak_BHC, step.rest_BH

    @staticmethod
    def _attended(step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """The attended blocks, their peaks, and the log-sum-exp over all of them."""
        return step.block_BGS, step.attention.scores.peak_BHS, step.attention.lse_BH

    def score_next(self, extent: Extent) -> Tensor | None:
        if not self.history.started:
            return None
        config = self.spec.config
        first = config.sink // config.block_size
        return self.history.predict_ahead(first, config.recent, extent.length_B, extent.padding_B, extent.capacity)

    def crop(self, length: int, read_keys: ReadKeys) -> None:
        # Score rows of rejected tokens stay in the history; they blur it only slightly.
        self.length = length
        self.history.crop(min(ceil_div(length, self.size), self.history.n_blocks))
        if self.sketch is not None:
            start = self.sketch.tail_start(length)
            self.sketch.crop(length, read_keys(start, length).to(self.spec.device))
