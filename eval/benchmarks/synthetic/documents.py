"""Evaluation documents: synthetic tasks planted in text files."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from attention_predictor.documents import encode
from attention_predictor.errors import ConfigError, DataError
from attention_predictor.eval.benchmarks.synthetic import tasks as synthetic
from attention_predictor.reading import read_text


def read_texts(path: Path) -> dict[str, str]:
    """Text files by name: the ``*.txt`` of a directory, or one file."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    found = {file.name: read_text(file, "text from") for file in files}
    texts = {name: text for name, text in found.items() if text.strip()}
    if not texts:
        raise DataError(f"no text in {path}: expected a .txt file or a directory of .txt files")
    return texts


def plant(
    tokenizer: PreTrainedTokenizerBase,
    texts: dict[str, str],
    *,
    tasks: Sequence[str],
    documents: int,
    questions: int,
    context: int,
    seed: int,
    split: synthetic.Split = "eval",
) -> list[synthetic.Sample]:
    """Documents of about ``context`` tokens, each with ``questions`` questions about statements planted in it.

    Args:
        tasks: Names of ``synthetic.TASKS``; documents alternate between them.
        context: Tokens of a document and any one of its questions.
        seed: The same seed gives the same documents.

    Raises:
        ConfigError: An unknown task, or a context too short for its statements or for any paragraph of the texts.
    """
    unknown = set(tasks) - set(synthetic.TASKS)
    if unknown:
        raise ConfigError(f"tasks={','.join(sorted(unknown))} not known: expected some of {', '.join(synthetic.TASKS)}")
    names = sorted(texts)
    # A statement each, and thrice as many for chains and few-shot labels, whose questions take several.
    planted = {task: questions * (3 if task in ("chain", "labels") else 1) for task in tasks}
    samples = []
    for number in range(documents):
        rng = random.Random(f"{seed}/{number}")
        task = tasks[number % len(tasks)]
        try:
            sample = synthetic.build(
                rng,
                _haystack(rng, names, texts),
                {task: planted[task]},
                length=context,
                count=lambda text: len(encode(tokenizer, text)),
                questions=questions,
                split=split,
                together=False,
            )
        except ValueError as error:  # statements, or all paragraphs of the texts, need more room than there is
            raise ConfigError(f"a context of {context} tokens is too short for task {task}: {error}") from error
        samples.append(sample)
    return samples


def _haystack(rng: random.Random, names: Sequence[str], texts: dict[str, str]) -> Iterator[str]:
    """Paragraphs from a random place of a random text on, then of another."""
    while True:
        paragraphs = [part for part in texts[rng.choice(names)].split("\n\n") if part.strip()]
        if len(paragraphs) == 1:
            paragraphs = paragraphs[0].splitlines()
        yield from paragraphs[rng.randrange(len(paragraphs)) :]
