"""The strongest stock way: the whole cache on the device, and full attention by torch's fastest kernel, captured.

Torch's kernels take lengths from the host, which a CUDA graph can't change. So every step decodes another token behind
the same prompt: it replaces the last step's token, and the length stays the same.

Suffixes: B sequences, G KV heads, H query heads, Q queries, T tokens of a call, L tokens of the prompt and one more,
D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from attention_predictor.errors import one_line
from attention_predictor.eval.bench.static_step import EAGER_STEPS, StockModelError
from attention_predictor.offload.hf.attachment import configs_of
from attention_predictor.offload.hf.compiled import CompiledLayers
from attention_predictor.offload.hf.versions import with_cache

NAME = "attention_predictor_resident"
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
TRIED = 5  # calls timed of each backend


class ResidentLayer(CacheLayerMixin):
    """Keys and values of one layer, each in one tensor with room for ``room`` tokens.

    Once it is full, every new token replaces the last one.
    """

    is_sliding = False

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.length = room, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        B, G, _, D = key_states.shape
        self.keys = key_states.new_zeros((B, G, self.room, D))
        self.values = torch.zeros_like(self.keys)
        self.is_initialized = True

    def close(self) -> None:
        """Leave room for one token more than there are."""
        self.room = self.length + 1

    @torch.compiler.disable  # as of ours
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        tokens = key_states.shape[2]
        start = min(self.length, self.room - tokens)
        self.keys[:, :, start : start + tokens] = key_states
        self.values[:, :, start : start + tokens] = value_states
        self.length = start + tokens
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return self.room


@torch.compiler.disable  # as of ours
def resident_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """Causal attention to all keys, without a mask. Registered with transformers as ``NAME``."""
    for name in ("softcap", "s_aux", "sliding_window"):
        if given.get(name) is not None:
            raise StockModelError(f"the model's attention asks for {name}, which torch's fast kernels don't have")
    causal, gqa = query.shape[2] > 1, query.shape[1] != key.shape[1]
    if causal and query.shape[2] != key.shape[2]:
        raise StockModelError("resident takes a prompt at once, then token by token")
    out_BHQD = scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling, enable_gqa=gqa)
    return out_BHQD.transpose(1, 2).contiguous(), None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """No mask is made: all keys are attended to."""


AttentionInterface.register(NAME, resident_attention)
AttentionMaskInterface.register(NAME, no_mask)


def resident_cache(model: PreTrainedModel, room: int) -> Cache:
    """An empty cache for ``room`` tokens.

    Raises:
        StockModelError: A layer of the model does not attend to the whole context.
    """
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for number, layer in enumerate(cache.layers):
        if type(layer) is not DynamicLayer:
            raise StockModelError(
                f"layer {number} keeps a {type(layer).__name__}: resident is for full attention alone"
            )
    cache.layers = [ResidentLayer(room) for _ in cache.layers]
    return cache


@contextmanager
def resident(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model's attention is ``resident_attention``."""
    configs = configs_of(model)
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


class ResidentStep:
    """Takes one-token steps over a ``resident_cache``, within ``resident``; captured on a GPU after ``EAGER_STEPS``.

    Attributes:
        backend: Which of torch's kernels attends, the fastest for these shapes; on a CPU torch's own choice.

    Raises:
        StockModelError: The model can't be captured.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, batch: int, *, compiled: bool) -> None:
        self.model, self.cache, device = model, cache, model.device
        self.ids_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position_B1: Tensor | None = None  # set after the cache is filled
        self.layers = CompiledLayers(model.get_decoder()) if compiled else nullcontext()
        self.backend: str | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.taken = 0

    @torch.no_grad()
    def __call__(self, token_B1: Tensor) -> Tensor:
        """Logits after these tokens, ``[B, 1, vocabulary]``; the next step overwrites them."""
        on_gpu = self.model.device.type == "cuda"
        if self.position_B1 is None:
            self.position_B1 = torch.full_like(self.ids_B1, int(self.cache.get_seq_length()))
            layers = [layer for layer in self.cache.layers if isinstance(layer, ResidentLayer)]
            for layer in layers:
                layer.close()
            self.backend = fastest_backend(layers[0], self.model) if on_gpu else "torch's choice"
        self.ids_B1.copy_(token_B1)
        if self.graph is None and self.taken >= EAGER_STEPS and on_gpu:
            self._capture()
        self.taken += 1
        if self.graph is None:
            return self._step()
        self.graph.replay()
        return self.logits

    def _step(self) -> Tensor:
        backend = sdpa_kernel(BACKENDS[self.backend]) if self.backend in BACKENDS else nullcontext()
        with backend, self.layers:
            inputs = {"position_ids": self.position_B1, "use_cache": True}
            try:
                return self.model(self.ids_B1, **inputs, **with_cache(self.model, self.cache)).logits
            except torch._dynamo.exc.TorchDynamoException as error:
                raise StockModelError(f"the stock model can't be compiled: {one_line(error, 200)}") from error

    def facts(self) -> dict[str, Any]:
        """What a row of timings says of it."""
        return {"attention": self.backend, "captured": self.graph is not None}

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self._step()
        except RuntimeError as error:
            raise StockModelError(f"the stock model can't be captured: {str(error).splitlines()[0]}") from error
        self.graph = graph


def fastest_backend(layer: ResidentLayer, model: PreTrainedModel) -> str:
    """The kernel of ``BACKENDS`` that attends to a layer's keys in the least time, by a trial on the GPU.

    Raises:
        StockModelError: None of them takes these shapes.
    """
    assert layer.keys is not None
    assert layer.values is not None
    heads = model.config.get_text_config(decoder=True).num_attention_heads
    (B, _, _, D), device = layer.keys.shape, layer.keys.device
    key_BGLD, value_BGLD = layer.keys[:, :, : layer.room], layer.values[:, :, : layer.room]
    query_BHQD = torch.zeros(B, heads, 1, D, dtype=layer.keys.dtype, device=device)
    found, refused = {}, []
    for name, backend in BACKENDS.items():
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            with sdpa_kernel(backend):
                for number in range(1 + TRIED):
                    if number == 1:  # the first call sets the kernel up
                        begun.record()
                    scaled_dot_product_attention(query_BHQD, key_BGLD, value_BGLD, enable_gqa=True)
                ended.record()
        except RuntimeError as error:
            refused.append(f"{name}: {str(error).splitlines()[0]}")
            continue
        torch.cuda.synchronize(device)
        found[name] = begun.elapsed_time(ended)
    if not found:
        raise StockModelError(f"none of torch's fast kernels attends to {list(layer.keys.shape)}: {'; '.join(refused)}")
    return min(found, key=lambda name: found[name])
