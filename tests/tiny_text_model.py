"""A tiny random model with a tokenizer of one token a character, saved to a directory; and samples to ask it."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from tiny_models import VOCABULARY, make_tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from attention_predictor.eval.benchmarks.longbench.tasks import TASKS

CHARACTERS = (string.ascii_letters + string.digits + " \n" + string.punctuation)[: VOCABULARY - 4]  # the rest: unknown
CHAT = "{% for turn in messages %}<{{ turn['content'] }}>{% endfor %}{% if add_generation_prompt %}A: {% endif %}"


def make_tiny_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Ids: 0 padding, 1 begins each text, 2 anything unknown, then characters, 96 ends a text."""
    vocabulary = {"<pad>": 0, "<s>": 1, "<?>": 2, "</s>": VOCABULARY - 1}
    vocabulary |= {character: 3 + number for number, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<?>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<?>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **names)


def save_tiny_text_model(folder: Path, *, chat: bool = False, **changes: Any) -> Path:
    """A model of two layers and its tokenizer, as ``--model`` takes them."""
    make_tiny_model(**changes).save_pretrained(folder)
    make_tiny_tokenizer(CHAT if chat else None).save_pretrained(folder)
    return folder


def longbench_row(task: str, number: int = 0, **changes: Any) -> dict[str, Any]:
    """A LongBench sample in the official form."""
    answer = {"passage_retrieval_en": "Paragraph 2", "passage_retrieval_zh": "段落2", "passage_count": "3"}
    row = {
        "input": f"What is it, {number}?",
        "context": f"Nothing in {task} is known of number {number}. " * (4 + number % 3),
        "answers": [answer.get(task, "nothing at all")],
        "length": 3000 * number,
        "dataset": task,
        "language": "en",
        "all_classes": ["nothing", "nothing at all", "something"] if TASKS[task].classes else None,
        "_id": f"{task}-{number}",
    }
    return row | changes


def write_longbench(folder: Path, tasks: Any, samples: int = 3, suffix: str = "") -> Path:
    """``<task>.jsonl`` files with a few samples each."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        write_jsonl(folder / f"{task}{suffix}.jsonl", [longbench_row(task, number) for number in range(samples)])
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
