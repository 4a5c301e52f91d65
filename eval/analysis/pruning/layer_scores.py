"""Scores of each layer on texts: block influence and query similarity.

Suffixes: B sequences, H query heads, T tokens, Q queries, D head size, C channels of the hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from attention_predictor.errors import AttachError
from attention_predictor.eval.analysis.pruning.shorten import decoder_layers
from attention_predictor.offload.hf.attention import tiered_attention, tiered_mask
from attention_predictor.offload.policies.query_similarity import WINDOW, query_similarity

NAME = "attention_predictor_watched"
WATCHER = "_attention_predictor_watcher"  # attribute of an attention module: the function that receives its queries
CHUNK = 4096  # tokens whose cosines are taken at once


@torch.no_grad()
def measure(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], after_each: Callable[[], object] = lambda: None
) -> dict[str, list[float | None]]:
    """``bi`` and ``q_similarity`` of every layer, each the mean over texts.

    Args:
        texts: Token ids of texts of one length, each longer than ``WINDOW`` tokens.
        after_each: Called after each text.

    Returns:
        BI is 1 − the cosine of a layer's input and output, mean over tokens. Query similarity is that of the last
        ``WINDOW`` queries, mean over heads; ``None`` for a layer without attention.

    Raises:
        AttachError: The model does not use transformers' attention interface, or hides its layers.
    """
    layers = decoder_layers(model)
    found: dict[str, list[list[float]]] = {name: [[] for _ in layers] for name in ("bi", "q_similarity")}
    with ExitStack() as stack:
        stack.enter_context(_watched(model, layers, found["q_similarity"]))
        for layer, values in zip(layers, found["bi"], strict=True):
            stack.callback(layer.register_forward_hook(_influence_into(values), with_kwargs=True).remove)
        for text in texts:
            model(torch.tensor([list(text)], device=model.device), use_cache=False, logits_to_keep=1)
            after_each()
    return {name: [fmean(values) if values else None for values in lists] for name, lists in found.items()}


def block_influence(before_BTC: Tensor, after_BTC: Tensor) -> float:
    """1 − the cosine of a layer's input and output, mean over tokens (ShortGPT, arXiv 2403.03853)."""
    pairs = zip(before_BTC.split(CHUNK, dim=1), after_BTC.split(CHUNK, dim=1), strict=True)
    cosines = [F.cosine_similarity(before.float(), after.float(), dim=-1).flatten() for before, after in pairs]
    return float(1 - torch.cat(cosines).mean())


def _influence_into(values: list[float]) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        before_BTC = args[0] if args else kwargs["hidden_states"]
        values.append(block_influence(before_BTC, output[0] if isinstance(output, tuple) else output))

    return hook


@contextmanager
def _watched(model: PreTrainedModel, layers: nn.ModuleList, found: list[list[float]]) -> Iterator[None]:
    """Context in which every attention call adds its query similarity to the layer's list."""
    config = model.config.get_text_config(decoder=True)
    before = model.config._attn_implementation
    with ExitStack() as stack:
        stack.callback(model.set_attn_implementation, before)
        model.set_attn_implementation(NAME)  # only warns where a model can't
        if config._attn_implementation != NAME:
            raise AttachError(
                f"{type(model).__name__} ignores the attention interface, so its queries can't be measured"
            )
        for layer, values in zip(layers, found, strict=True):
            for module in layer.modules():

                def watch(query_BHQD: Tensor, values: list[float] = values) -> None:
                    values.append(float(query_similarity(query_BHQD[:, :, -WINDOW:]).mean()))

                setattr(module, WATCHER, watch)
                stack.callback(delattr, module, WATCHER)
        yield


def _watched_attention(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    watcher = getattr(module, WATCHER, None)
    if watcher is not None:
        watcher(query)
    return tiered_attention(module, query, *args, **kwargs)


AttentionInterface.register(NAME, _watched_attention)
AttentionMaskInterface.register(NAME, tiered_mask)
