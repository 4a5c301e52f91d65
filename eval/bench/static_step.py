"""The floor for captured steps: the stock model over a static cache, captured as a CUDA graph.

Suffixes: B sequences, C tokens that the cache has room for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer

from attention_predictor.errors import AttentionPredictorError
from attention_predictor.offload.hf.versions import with_cache

EAGER_STEPS = 2  # taken before one is captured, as of ours: libraries set themselves up in them


class StockModelError(AttentionPredictorError):
    """The stock model can't be compiled or captured; its row gives the reason."""


def plain_static_cache(model: PreTrainedModel, context: int) -> StaticCache:
    """A static cache in which layers with a window have room for the whole context too.

    A full static layer with a window makes a tensor from a number of the host's at every step, which no capture can.
    The masks of ``StaticStep`` keep the windows.
    """
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=context)
    cache.layers = [
        StaticLayer(max_cache_len=context) if isinstance(layer, StaticSlidingWindowLayer) else layer
        for layer in cache.layers
    ]
    return cache


class StaticStep:
    """Takes one-token steps over a ``plain_static_cache``; on a GPU they are one CUDA graph after ``EAGER_STEPS``.

    Masks are made here, from the position on the device: transformers' own read numbers of the host's.

    Raises:
        StockModelError: The model asks the host within its forward, or attends in chunks.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, context: int, batch: int) -> None:
        self.model, self.cache, device = model, cache, model.device
        config = model.config.get_text_config(decoder=True)
        # As transformers sees this model's layers, which tells whether it wants a mask for each kind.
        stock = StaticCache(config=config, max_cache_len=context).layers
        sliding = [isinstance(layer, StaticSlidingWindowLayer) for layer in stock]
        self.window: int | None = getattr(config, "sliding_window", None) if any(sliding) else None
        if any(sliding) and self.window is None:
            raise StockModelError("the stock model has chunked attention, which this timing does not support")
        self.both_kinds = any(sliding) and not all(sliding)
        self.as_bool = config._attn_implementation == "sdpa"  # all others add masks to their logits
        self.batch, self.token_C = batch, torch.arange(context, device=device)
        self.ids_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position_11: Tensor | None = None  # position of the last token; set after the cache is filled
        self.graph: torch.cuda.CUDAGraph | None = None
        self.taken = 0

    @torch.no_grad()
    def __call__(self, token_B1: Tensor) -> Tensor:
        """Logits after these tokens, ``[B, 1, vocabulary]``; the next step overwrites them."""
        if self.position_11 is None:
            self.position_11 = torch.full((1, 1), int(self.cache.get_seq_length()) - 1, device=self.model.device)
        self.ids_B1.copy_(token_B1)
        if self.graph is None and self.taken >= EAGER_STEPS and self.model.device.type == "cuda":
            self._capture(self.position_11)
        self.taken += 1
        if self.graph is None:
            return self._step(self.position_11)
        self.graph.replay()
        return self.logits

    def _step(self, position_11: Tensor) -> Tensor:
        position_11.add_(1)
        seen_1C = self.token_C <= position_11
        masks = {"full_attention": self._mask(seen_1C)}
        if self.window is not None:
            masks["sliding_attention"] = self._mask(seen_1C & (self.token_C > position_11 - self.window))
        mask = masks if self.both_kinds else list(masks.values())[-1]
        position_B1 = position_11.expand(self.batch, 1)
        inputs = {"attention_mask": mask, "position_ids": position_B1, "use_cache": True}
        return self.model(self.ids_B1, **inputs, **with_cache(self.model, self.cache)).logits

    def _mask(self, allowed_1C: Tensor) -> Tensor:
        """``[B, 1, 1, C]``, bool or added to the logits."""
        allowed_B11C = allowed_1C.expand(self.batch, 1, 1, -1)
        if self.as_bool:
            return allowed_B11C
        dtype = self.model.dtype
        nothing = torch.zeros((), dtype=dtype, device=allowed_1C.device)
        return nothing.expand_as(allowed_B11C).masked_fill(~allowed_B11C, torch.finfo(dtype).min)

    def _capture(self, position_11: Tensor) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self._step(position_11)
        except RuntimeError as error:
            raise StockModelError(f"the stock model can't be captured: {str(error).splitlines()[0]}") from error
        self.graph = graph
