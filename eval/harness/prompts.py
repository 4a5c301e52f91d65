"""Tokenises prompts: applies the chat template, shortens prompts that are too long."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from attention_predictor.documents import encode
from attention_predictor.errors import ConfigError
from attention_predictor.loading import load_config

# Some templates put the day into the prompt; this one, Llama 3.1's own default, keeps results from changing with it.
DATE = "26 Jul 2024"


def check_chat(tokenizer: PreTrainedTokenizerBase, why: str) -> None:
    """``ConfigError`` for a tokenizer without a chat template; ``why`` says what needs it and what can be done."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"this model's tokenizer has no chat template: {why}")


def context_length(model: str) -> int | None:
    """Number of positions of a model, from its configuration; ``None`` if it has no limit."""
    return getattr(load_config(model).get_text_config(decoder=True), "max_position_embeddings", None)


def check_context(model: str, context: int) -> None:
    """``ConfigError`` for a ``--context`` of more tokens than a model has positions for."""
    positions = context_length(model)
    if positions is not None and context > positions:
        raise ConfigError(f"--context {context}: the model has positions for {positions} tokens")


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt with special tokens, plain or as a user's turn of a chat."""
    if not chat:
        return list(tokenizer(text, verbose=False)["input_ids"])
    turns = [{"role": "user", "content": text}]
    whole = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, date_string=DATE)
    return encode(tokenizer, str(whole))


def fitted_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool, longest: int | None, room: int | None
) -> tuple[list[int], bool]:
    """Token ids of a prompt that fits, and whether something was left out.

    A text of more than ``longest`` tokens keeps half as many from its front and from its end, which is where
    instructions stand (LongBench, section 4.1). It is cut as text, before the chat template is put around it.

    Args:
        longest: Tokens of the text; ``None`` for as many as there is room for.
        room: Tokens of the whole prompt; where template or seam need more than is left, more of the middle goes.
            ``None`` if there is no limit.
    """
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    limits = [limit for limit in (longest, room) if limit is not None]
    allowed, cut = min(limits, default=len(ids)), False
    while True:
        if len(ids) > allowed:
            half, cut = allowed // 2, True
            ends = (ids[:half], ids[len(ids) - half :])
            shorter = "".join(str(tokenizer.decode(end, skip_special_tokens=True)) for end in ends)
        else:
            shorter = text
        prompt = prompt_ids(tokenizer, shorter, chat=chat)
        if room is None or len(prompt) <= room or allowed < 2:
            return prompt, cut
        allowed = max(min(allowed, len(ids)) - (len(prompt) - room), 0)
