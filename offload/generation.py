"""A minimal decoding loop: tokens are chosen on the device, and the host rarely waits for them.

Suffixes: B sequences, T tokens, V vocabulary, E end tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attention_predictor.kinds import number, temperature, whole
from attention_predictor.offload.hf.cache import TieredCache
from attention_predictor.offload.hf.graph import LEFT_PADDING
from attention_predictor.offload.hf.versions import with_cache
from attention_predictor.offload.inputs import check

SAMPLING = {
    "temperature": temperature(),
    "top_k": whole(0),
    "top_p": number("more than 0, at most 1", lambda value: 0 < value <= 1),
}
CHECK_INTERVAL = 16  # tokens between checks, on the host, whether all sequences have ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is chosen from its logits.

    Attributes:
        temperature: Divides the logits; 0 takes the largest one.
        top_k: Sample among this many largest logits; 0: all.
        top_p: Sample among the smallest set of tokens with this probability.

    Raises:
        ConfigError: A value that is not allowed.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, kind in SAMPLING.items():
            check(name, getattr(self, name), kind)

    def choose(self, logits_BV: Tensor, generator: torch.Generator | None) -> Tensor:
        """Next tokens [B, 1], without host synchronisation."""
        if self.temperature == 0:
            return logits_BV.argmax(-1, keepdim=True)
        logits_BV = logits_BV.float() / self.temperature
        if self.top_k:
            least_B1 = logits_BV.topk(min(self.top_k, logits_BV.shape[1]), -1).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
        if self.top_p < 1:
            sorted_BV, order_BV = logits_BV.softmax(-1).sort(-1, descending=True)
            beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= self.top_p  # the tokens before it reach top_p
            logits_BV = logits_BV.masked_fill(beyond_BV.scatter(1, order_BV, beyond_BV), -torch.inf)
        # argmax of p / e with exponential e is a sample of p; multinomial would read the numbers on the host.
        draw_BV = torch.empty_like(logits_BV).exponential_(generator=generator)
        return (logits_BV.softmax(-1) / draw_BV).argmax(-1, keepdim=True)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    cache: TieredCache,
    ids_BT: Tensor,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None,
    sampling: Sampling,
    ends: Sequence[int],
    pad_token_id: int,
    prefill_chunk_size: int | None,
    seed: int | None,
) -> Tensor:
    """See ``Engine.generate``, which checks the arguments and that the new, empty cache will fit."""
    (B, T), device = ids_BT.shape, ids_BT.device
    padded = attention_mask is not None and not bool(attention_mask.all())
    mask_BT = attention_mask.to(device, torch.int64) if padded and attention_mask is not None else None
    only_left = mask_BT is not None and bool((mask_BT.bool() == (mask_BT.cumsum(-1) > 0)).all())
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    end_E = torch.tensor(ends, dtype=torch.int64, device=device)

    logits_BV = _prefill(model, cache, ids_BT, mask_BT, prefill_chunk_size)
    position_B1 = torch.full((B, 1), T, device=device) if mask_BT is None else mask_BT.sum(-1, keepdim=True)
    new_BT = torch.full((B, max_new_tokens), pad_token_id, dtype=torch.int64, device=device)
    ended_B1 = torch.zeros((B, 1), dtype=torch.bool, device=device)
    for count in range(max_new_tokens):
        token_B1 = sampling.choose(logits_BV, generator).masked_fill(ended_B1, pad_token_id)
        new_BT[:, count : count + 1] = token_B1
        if ends:
            ended_B1 = ended_B1 | (token_B1 == end_E).any(-1, keepdim=True)
            if count % CHECK_INTERVAL == CHECK_INTERVAL - 1 and bool(ended_B1.all()):
                break
        if count + 1 == max_new_tokens:
            break
        if mask_BT is not None:
            mask_BT = torch.nn.functional.pad(mask_BT, (0, 1), value=1)
            if only_left:
                setattr(mask_BT, LEFT_PADDING, True)  # so that steps need not read the mask
        logits_BV, position_B1 = next_logits(model, cache, token_B1, mask_BT, position_B1), position_B1 + 1
    return torch.cat([ids_BT, new_BT[:, : _until_all_ended(new_BT[:, : count + 1], end_E)]], 1)


def _prefill(
    model: PreTrainedModel, cache: TieredCache, ids_BT: Tensor, mask_BT: Tensor | None, chunk: int | None
) -> Tensor:
    """Logits after the prompt, [B, V]."""
    position_BT = None if mask_BT is None else (mask_BT.cumsum(-1) - 1).clamp_min(0)
    for start in range(0, ids_BT.shape[1], chunk or ids_BT.shape[1]):
        stop = min(start + (chunk or ids_BT.shape[1]), ids_BT.shape[1])
        logits_BV = next_logits(
            model,
            cache,
            ids_BT[:, start:stop],
            None if mask_BT is None else mask_BT[:, :stop],
            None if position_BT is None else position_BT[:, start:stop],
        )
    return logits_BV


def next_logits(
    model: PreTrainedModel,
    cache: TieredCache,
    ids_BT: Tensor,
    mask_BT: Tensor | None = None,
    position_BT: Tensor | None = None,
) -> Tensor:
    """Logits ``[B, V]`` after these tokens, which the cache then holds."""
    inputs = {"attention_mask": mask_BT, "position_ids": position_BT, "use_cache": True, "logits_to_keep": 1}
    return model(ids_BT, **inputs, **with_cache(model, cache)).logits[:, -1]


def _until_all_ended(new_BT: Tensor, end_E: Tensor) -> int:
    """Number of tokens until the last sequence ends, its end token included."""
    if not len(end_E):
        return new_BT.shape[1]
    is_end_BT = (new_BT[..., None] == end_E).any(-1)
    last_B = torch.where(is_end_BT.any(1), is_end_BT.int().argmax(1) + 1, new_BT.shape[1])
    return int(last_B.max())
