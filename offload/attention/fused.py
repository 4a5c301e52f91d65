"""Attention by a fused kernel that also returns the log-sum-exp of the logits, needed to merge partial results.

Uses flash-attn if installed, for half precision on a GPU; otherwise the kernel that torch's
``scaled_dot_product_attention`` would use (FlashAttention, cuDNN, memory-efficient; on a CPU its own). That function
does not return the log-sum-exp, so the underlying operations are called.

Suffixes: B sequences, G KV heads, H query heads, Q queries, T tokens, D head size.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

logger = logging.getLogger(__name__)


class Piece(NamedTuple):
    """Attention to some of the keys: the output normalised over them, and the fp32 log-sum-exp of their logits."""

    out_BHQD: Tensor
    lse_BHQ: Tensor


def why_no_kernel(query_BHQD: Tensor, key_BGTD: Tensor, softcap: float | None) -> str | None:
    """Why no fused kernel supports these tensors, or ``None``."""
    if torch.is_grad_enabled() and query_BHQD.requires_grad:
        return "gradients are recorded (torch.no_grad() prevents it)"
    if flash_attn(query_BHQD, softcap) is not None:
        return None
    if softcap is not None:
        return "logits are capped (flash-attn could do it; it is not installed, or not for this device and dtype)"
    if query_BHQD.shape[-1] % 8 or _backend(query_BHQD, key_BGTD, causal=False) is None:
        where = f"{query_BHQD.dtype}, head size {query_BHQD.shape[-1]}, {query_BHQD.device.type}"
        return f"torch has no fused attention for {where}".replace("torch.", "")
    return None


def attend_piece(
    query_BHQD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, scaling: float, softcap: float | None, *, causal: bool
) -> Piece | None:
    """Attention of all queries to all keys or, if ``causal`` (Q = T), to its own and earlier keys.

    ``why_no_kernel`` must have returned ``None``. Returns ``None`` if torch has no kernel for exactly these sizes.
    """
    if (kernel := flash_attn(query_BHQD, softcap)) is not None:
        capped = {} if softcap is None else {"softcap": softcap}
        out_BQHD, lse_BHQ, _ = kernel(
            *(x.transpose(1, 2) for x in (query_BHQD, key_BGTD, value_BGTD)),
            softmax_scale=scaling,
            causal=causal,
            return_attn_probs=True,
            **capped,
        )
        return Piece(out_BQHD.transpose(1, 2), lse_BHQ)
    backend = _backend(query_BHQD, key_BGTD, causal=causal)
    if backend == SDPBackend.EFFICIENT_ATTENTION:
        groups = query_BHQD.shape[1] // key_BGTD.shape[1]
        key_BGTD, value_BGTD = (x.repeat_interleave(groups, 1) for x in (key_BGTD, value_BGTD))
    if backend is None:
        return None
    out_BHQD, lse, *_ = _OPERATIONS[backend](query_BHQD, key_BGTD, value_BGTD, scaling, causal)
    B, H, Q, _ = query_BHQD.shape
    return Piece(out_BHQD, lse.reshape(B, H, -1)[..., :Q])  # some kernels pad the queries, some add a dimension


def takes_flash_attn(query_BHQD: Tensor) -> bool:
    """Whether flash-attn supports attention of these queries."""
    recorded = torch.is_grad_enabled() and query_BHQD.requires_grad
    return not recorded and flash_attn(query_BHQD, None) is not None


def flash_attn(query_BHQD: Tensor, softcap: float | None) -> Callable[..., Any] | None:
    """flash-attn's function, if it is installed and supports this call; else ``None``."""
    half = query_BHQD.dtype in (torch.float16, torch.bfloat16)
    D = query_BHQD.shape[-1]
    if not (query_BHQD.is_cuda and half and D % 8 == 0 and D <= 256) or (kernel := _installed()) is None:
        return None
    if torch.cuda.get_device_capability(query_BHQD.device) < (8, 0):
        return None
    return kernel if softcap is None or "softcap" in inspect.signature(kernel).parameters else None


@functools.cache
def _installed() -> Callable[..., Any] | None:
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        logger.warning("flash-attn is installed but can't be imported; using torch's attention: %s", error)
        return None
    return flash_attn_func


def _backend(query_BHQD: Tensor, key_BGTD: Tensor, *, causal: bool) -> SDPBackend | None:
    """The backend that torch would choose, if it returns the log-sum-exp; else ``None``."""
    groups = query_BHQD.shape[1] // key_BGTD.shape[1]
    # The memory-efficient kernel does not support grouped queries: ask for it with one KV head per query head.
    alike = key_BGTD[:, :1].expand(-1, query_BHQD.shape[1], -1, -1)
    for keys in (key_BGTD, alike) if groups > 1 else (key_BGTD,):
        shared = keys is key_BGTD and groups > 1
        try:
            choice = int(torch._fused_sdp_choice(query_BHQD, keys, keys, is_causal=causal, enable_gqa=shared))
        except RuntimeError:  # none of the backends that the caller allows
            continue
        backend = SDPBackend(choice)
        if backend in _OPERATIONS and not (shared and backend == SDPBackend.EFFICIENT_ATTENTION):
            return backend
    return None


def _flash(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> Any:
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scaling)
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scaling)


def _efficient(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> Any:
    operation = torch.ops.aten._scaled_dot_product_efficient_attention
    return operation(query, key, value, None, True, 0.0, causal, scale=scaling)


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> Any:
    operation = torch.ops.aten._scaled_dot_product_cudnn_attention
    return operation(query, key, value, None, True, 0.0, causal, scale=scaling)


_OPERATIONS: dict[SDPBackend, Callable[..., Any]] = {
    SDPBackend.FLASH_ATTENTION: _flash,
    SDPBackend.EFFICIENT_ATTENTION: _efficient,
    SDPBackend.CUDNN_ATTENTION: _cudnn,
}
