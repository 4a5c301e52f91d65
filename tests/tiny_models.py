"""Tiny random models of many families."""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 97

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 96,
}

# family: (config class, what it needs beyond _COMMON)
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {}),
    "llama-mha": ("LlamaConfig", {"num_key_value_heads": 4}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-sliding": ("MistralConfig", {"sliding_window": 24}),  # every layer slides: nothing to offload
    "ministral": (
        "MinistralConfig",
        {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma2": ("Gemma2Config", {"sliding_window": 24, "query_pre_attn_scalar": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        {"sliding_window": 24, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3Config", {}),
    "gpt-oss": (
        "GptOssConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}

# Of further families: which channels are rotated, in which order, and by whom.
ROTATING: dict[str, tuple[str, dict]] = {
    "cohere2": ("Cohere2Config", {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}),
    "glm": ("GlmConfig", {"partial_rotary_factor": 0.5}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
}


def make_tiny_model(family: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    name, extra = (FAMILIES | ROTATING)[family]
    config = getattr(transformers, name)(**(_COMMON | extra | changes))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # sharper attention and logits than at initialisation: ties would prove nothing
                parameter.mul_(3.0)
            elif "sinks" in name:
                parameter.normal_()
    model.generation_config.eos_token_id = None
    return model.eval()
