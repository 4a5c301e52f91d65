"""AttachedModel: keeps a model attached under one variant while samples succeed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

from transformers import PreTrainedModel

from attention_predictor.errors import AttentionPredictorError
from attention_predictor.eval.harness.variants import Variant
from attention_predictor.offload.engine import Engine


class AttachedModel:
    """Attaches the model for the first sample, and again after a failed sample.

    Attaching takes longer than a short sample: it loads the predictor, pins host memory and loads kernels.
    """

    def __init__(self, model: PreTrainedModel, variant: Variant) -> None:
        self.model, self.variant = model, variant
        self._stack = ExitStack()
        self._engine: Engine | None = None
        self._at_attach: Counter[str] = Counter()  # fallbacks noted at attach, part of every sample's stats

    def __enter__(self) -> AttachedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Give the model back as it was."""
        self._engine = None
        self._stack.close()

    @contextmanager
    def sample(self) -> Iterator[Engine | None]:
        """The engine with stats of this sample only; ``None`` for the stock model."""
        if self._engine is not None and not self._is_anew(self._engine):
            self.detach()
        if self._engine is None:
            self._engine = self._stack.enter_context(self.variant.attached(self.model))
            if self._engine is not None:
                self._at_attach = Counter(self._engine.stats.fallbacks)
        try:
            yield self._engine
        except BaseException:
            self.detach()
            raise

    def _is_anew(self, engine: Engine) -> bool:
        """Wait for the last sample's fetches and reset the stats; ``False`` if a fetch failed."""
        try:
            for prefetcher in (stage.prefetcher for stage in engine.runtime.stages):
                prefetcher.wait(prefetcher.submit(_nothing))  # queued after the last sample's fetches
        except AttentionPredictorError:
            return False
        stats = engine.stats
        stats.reset()
        stats.fallbacks.update(self._at_attach)
        return True


def _nothing() -> None:
    """An empty job; waiting for it waits for all jobs before it."""
