"""Tiny Llamas in GGUF files, written by the package ``gguf``: what llama.cpp's converter would write of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from tiny_models import make_tiny_model
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

CHAT = "{% for turn in messages %}<{{ turn['content'] }}>{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
SPECIAL = ["<s>", "</s>"]  # begin a text, end it
TOKENS = [*bytes_to_unicode().values(), "th", "the", *SPECIAL]
BEGIN, END = len(TOKENS) - 2, len(TOKENS) - 1
# A tensor's name here, and in transformers' Llama.
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def make_byte_model(**changes: Any) -> PreTrainedModel:
    """A Llama of two layers whose tokens are bytes, "th" and "the"; its matrices can be split into blocks of 32."""
    ids = {"vocab_size": len(TOKENS), "bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": None}
    return make_tiny_model("llama", **({"intermediate_size": 64, "tie_word_embeddings": False} | ids | changes))


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: Type = Type.F32,
    *,
    architecture: str = "llama",
    tokenizer: bool = True,
    chat: str | None = None,
    more: dict[str, int] | None = None,
) -> Path:
    """The model in a file, its matrices in a type of number or block.

    Args:
        tokenizer: Whether its tokens are in it too.
        chat: The chat template in it.
        more: Further metadata, whole numbers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer, config = gguf.GGUFWriter(path, architecture), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in (more or {}).items():
        writer.add_uint32(key, value)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([gguf.TokenType.NORMAL] * BEGIN + [gguf.TokenType.CONTROL] * len(SPECIAL))
        writer.add_token_merges(["t h", "th e"])
        writer.add_bos_token_id(BEGIN)
        writer.add_eos_token_id(END)
        if chat is not None:
            writer.add_chat_template(chat)
    weights, heads = model.state_dict(), {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {f"{own}.weight": weights[f"{name}.weight"] for own, name in _outer()}
    for layer in range(config.num_hidden_layers):
        for own, name in NAMES.items():
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            tensors[f"blk.{layer}.{own}.weight"] = _interleaved(weight, heads[own]) if own in heads else weight
    for name, weight in tensors.items():
        stored = kind if weight.dim() == 2 else Type.F32
        writer.add_tensor(name, gguf.quants.quantize(weight.float().numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _outer() -> list[tuple[str, str]]:
    return [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")]


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection as llama.cpp rotates them: neighbours in pairs, not halves."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
