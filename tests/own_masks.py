"""Models that give one of their layers a mask of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from attention_predictor.offload.hf.versions import cache_argument


def give_mask(model: PreTrainedModel, number: int, kind: str) -> None:
    """Let a layer of a tiny Llama make masks of this kind (``OwnMask``)."""
    model.model.layers[number].self_attn.__class__ = type("Own", (OwnMask,), {"kind": kind})


class OwnMask(LlamaAttention):
    """Attention with a mask that the model makes itself."""

    kind = ""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        cache, new = kwargs[cache_argument(LlamaAttention.forward)], hidden_states.shape[1]
        key_T = torch.arange(int(cache.layers[self.layer_idx].get_seq_length()) + new, device=hidden_states.device)
        age_QT = key_T[-new:, None] - key_T
        hidden = torch.finfo(torch.float32).min
        mask_QT = torch.zeros(age_QT.shape, device=hidden_states.device).masked_fill(age_QT < 0, hidden)
        if self.kind == "dilated" or (self.kind == "long" and len(key_T) > 100):
            mask_QT = mask_QT.masked_fill(age_QT % 3 == 1, hidden)
        elif self.kind == "window":
            mask_QT = mask_QT.masked_fill(age_QT >= 40, hidden)
        elif self.kind == "biased":
            mask_QT = mask_QT - 0.05 * age_QT.clamp_min(0)
        elif self.kind == "start":  # all but the first tokens don't see these
            mask_QT = mask_QT.masked_fill((key_T < 5) & (age_QT + key_T >= 5), hidden)
        elif self.kind == "prefix":  # the prompt's first tokens see each other
            mask_QT = mask_QT.masked_fill(key_T < 30, 0.0)
        return super().forward(hidden_states, *args, **kwargs | {"attention_mask": mask_QT[None, None]})
