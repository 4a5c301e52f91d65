"""The attention and mask functions registered with transformers; all state lives in the cache.

Suffixes: B sequences, G KV heads, H query heads, Q queries, T tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from attention_predictor.errors import AttachError
from attention_predictor.offload.attention.dense import Terms, attend_prompt
from attention_predictor.offload.hf.fixed_layer import FixedLayer
from attention_predictor.offload.hf.handed import HANDLE
from attention_predictor.offload.hf.layer import TieredLayer, as_under_autocast
from attention_predictor.offload.hf.watched import WatchedLayer

NAME = "attention_predictor"


@torch.compiler.disable  # compiled layers fuse only the operations around it
def tiered_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a tiered layer, or plain attention for layers that have another cache or none.

    Args:
        query: ``[B, H, Q, D]``; key and value ``[B, G, T, D]``.
        attention_mask: The result of ``tiered_mask``, or the caller's 4-D mask.
        softcap: Gemma 2's cap on the logits.
        s_aux: GPT-OSS's sink logits, one per head.
        is_causal: Whether queries see only earlier tokens; ``None``: as ``module.is_causal`` says.

    Returns:
        ``[B, Q, H, D]`` contiguous, and no weights.

    Raises:
        AttachError: The model needs something that tiered attention does not support, or changed the keys, values or
            mask that the cache and ``tiered_mask`` returned.
    """
    layer: TieredLayer | FixedLayer | WatchedLayer | None = getattr(key, HANDLE, None)
    if isinstance(layer, WatchedLayer):
        layer.see(query, key, attention_mask)
        layer = None
    if dropout and getattr(key, HANDLE, None) is None:
        raise AttachError(
            f"{type(module).__name__} would leave out dropout: its model has the configuration object of an attached "
            "one, or a copy of it; make it with one of its own, or call eval()"
        )
    if biases := sorted(name for name, given in kwargs.items() if "bias" in name and given is not None):
        raise AttachError(f"{type(module).__name__} adds {', '.join(biases)} to its logits: not supported")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    terms = Terms(scaling if scaling is not None else query.shape[-1] ** -0.5, softcap, s_aux, attention_mask)
    if layer is not None:
        # If layers share keys, the other layer may have attended to them already.
        if layer.handed is not None and layer.awaits_attention:
            layer.handed.check(layer.number, key, value, query)
        if dropout:
            layer.runtime.note_fallback(f"attention dropout of {dropout:g} is left out of a model in training mode")
        if isinstance(layer, TieredLayer):  # a fixed layer reads no mask: lengths on the device decide
            layer.check_terms(terms, causal)
    query, key, value = as_under_autocast(query, key, value)
    with torch.autocast(query.device.type, enabled=False):
        if layer is not None:
            out = layer.attend(query, key, value, terms)
        else:
            out = attend_prompt(query, key, value, terms, causal=causal)
    return out.transpose(1, 2).contiguous(), None


def tiered_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """``None`` for causal attention, ``[B, kv_length]`` for causal attention with padding, else the stock 4-D mask.

    The short forms save the 16 GB mask of a prompt of 128K tokens, and any mask in a decoding step.
    """
    plain = (
        mask_function is causal_mask_function
        and local_size is None
        and kv_offset == 0
        and not isinstance(q_offset, Tensor)
        and kv_length == q_offset + q_length
        and (attention_mask is None or (attention_mask.dim() == 2 and attention_mask.shape[1] == kv_length))
    )
    if plain:
        return None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        # ``None`` would mean causal here, which a local mask is not once the window is full.
        allow_is_causal_skip=False,
        **kwargs,
    )


# Both registries are global and keyed by name; the functions hold no state, so any number of models share them.
AttentionInterface.register(NAME, tiered_attention)
AttentionMaskInterface.register(NAME, tiered_mask)
